"""The clock of a run and values that change with it.

A schedule is a frozen setting that is called with the progress of the run: it has no state to save or resume.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, model_validator

from ssl_pipeline.config import Config


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` of `total_steps` optimizer steps are done; `steps_per_epoch` make an epoch."""

    step: int
    total_steps: int
    steps_per_epoch: float

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with the fraction of the present one."""
        return self.step / self.steps_per_epoch


def _check_duration(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"a duration cannot be negative. Got {value}.")
        return value
    if re.fullmatch(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)(ep|%)", value):
        return value
    raise ValueError(
        f"a duration is a number of steps (1250), of epochs ('10ep') or a share of the run ('5%'). Got {value!r}."
    )


Duration = Annotated[int | str, AfterValidator(_check_duration)]
"""`1250` optimizer steps, `10ep` epochs or `5%` of the run."""


def steps_in(duration: int | str, progress: Progress) -> int:
    """The number of optimizer steps that a duration lasts in the run of `progress`."""
    if isinstance(duration, int):
        return duration
    if duration.endswith("%"):
        return round(float(duration[:-1]) / 100 * progress.total_steps)
    return round(float(duration.removesuffix("ep")) * progress.steps_per_epoch)


class Schedule(Config):
    """A value over the run: linear from `start` to `value` during `warmup`, then to `final` at the end of the run.

    With t = step, W = warm-up steps, T = total steps (counted in whole epochs instead if `every` is `epoch`):

        t < W:   start + (value - start) * t / W              (t / (W - 1) if `inclusive`)
        t >= W:  value                                        if `final` is null
                 final + (value - final) * (1 + cos(pi * u)) / 2, u = (t - W) / (T - W)   (`cosine`)
                 value + (final - value) * u                                              (`linear`)
                 value * cos(7 * pi * u / 16)                                             (`cosine_7_16`, FixMatch)
    """

    shorthand: ClassVar[str | None] = "value"

    value: float
    """The value after the warm-up."""
    final: float | None = None
    """The value that the decay ends with; null keeps `value`."""
    warmup: Duration = 0
    """How long the value rises linearly from `start`."""
    start: float = 0.0
    """The first value of the warm-up."""
    inclusive: bool = False
    """Whether the last warm-up step already has `value` (numpy.linspace, DINO), or the step after it (MoCo, MAE)."""
    decay: Literal["cosine", "linear", "cosine_7_16"] = "cosine"
    """The way from `value` to `final`; `cosine_7_16` ends at 0.195 * value and ignores `final`."""
    every: Literal["step", "epoch"] = "step"
    """Whether the value changes with every step or only when an epoch begins."""

    @model_validator(mode="after")
    def _warmup_needs_start(self) -> Schedule:
        if self.inclusive and self.warmup == 0:
            raise ValueError(
                "inclusive speaks of the last warm-up step, but warmup is 0. Set warmup or leave inclusive out."
            )
        return self

    def __call__(self, progress: Progress) -> float:
        """The value at `progress`."""
        now: float = progress.step
        total: float = progress.total_steps
        warmup: float = steps_in(self.warmup, progress)
        if self.every == "epoch":
            now = math.floor(progress.epoch + 1e-9)
            total, warmup = (round(steps / progress.steps_per_epoch) for steps in (total, warmup))
        if now < warmup:
            return self.start + (self.value - self.start) * now / max(warmup - self.inclusive, 1)
        done = min((now - warmup) / max(total - warmup, 1), 1.0)
        if self.decay == "cosine_7_16":
            return self.value * math.cos(7 * math.pi * done / 16)
        if self.final is None:
            return self.value
        if self.decay == "linear":
            return self.value + (self.final - self.value) * done
        return self.final + (self.value - self.final) * (1 + math.cos(math.pi * done)) / 2

    def times(self, factor: float) -> Schedule:
        """The same schedule with `value` multiplied; `start` and `final` stay, as the official learning rates do."""
        return self.model_copy(update={"value": self.value * factor})
