"""The clock of a run and values that change with it.

A schedule is a frozen setting that is called with the progress of the run: it has no state to save or resume.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from ssl_pipeline.config import Config, InRange

LONGEST = 10**9  # steps or epochs of a duration


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` of `total_steps` optimizer steps are done; `steps_per_epoch` make an epoch.

    is_logged: whether the metrics of this step are read; what is computed, or sent, for these alone can be left out of
    the others.
    """

    step: int
    total_steps: int
    steps_per_epoch: float
    is_logged: bool = True

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with the fraction of the present one."""
        return self.step / self.steps_per_epoch


@dataclass(frozen=True, eq=False)
class Duration:
    """`1250` optimizer steps, `10ep` epochs or `5%` of the run; it equals, and is dumped as, what is written.

    Raises ValueError for anything else.
    """

    written: int | str
    _number: float = field(init=False, repr=False)
    _unit: Literal["steps", "ep", "%"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        number, unit = _parse(self.written)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_unit", unit)

    def steps(self, progress: Progress) -> int:
        """The number of optimizer steps that this lasts in the run of `progress`."""
        if self._unit == "%":
            return round(self._number / 100 * progress.total_steps)
        return round(self._number * (progress.steps_per_epoch if self._unit == "ep" else 1))

    def times(self, factor: int) -> Duration:
        """The duration that is `factor` times as long."""
        if self._unit == "steps":
            return Duration(round(self._number) * factor)
        return Duration(f"{self._number * factor:f}{self._unit}")

    @property
    def is_zero(self) -> bool:
        """Whether it lasts no time at all, in whatever unit: a period of 0 means never."""
        return self._number == 0

    @property
    def is_whole_run(self) -> bool:
        """Whether it lasts as long as the run, however long that is."""
        return self._unit == "%" and self._number == 100

    def __eq__(self, other: object) -> bool:
        return self.written == (other.written if isinstance(other, Duration) else other)

    def __hash__(self) -> int:
        return hash(self.written)

    def __str__(self) -> str:
        return str(self.written)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        raw = core_schema.union_schema([core_schema.int_schema(strict=True), core_schema.str_schema(strict=True)])
        read = core_schema.no_info_after_validator_function(cls, raw)
        return core_schema.json_or_python_schema(
            json_schema=read,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), read]),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda duration: duration.written),
        )


def _parse(written: int | str) -> tuple[float, str]:
    number, unit = _number_and_unit(written)
    if unit == "%" and number > 100:
        raise ValueError(f"a share of the run is at most 100%. Got {written}.")
    if number > LONGEST:
        raise ValueError(f"a duration is at most {LONGEST} steps or epochs. Got {written}.")
    return number, unit


def _number_and_unit(written: int | str) -> tuple[float, str]:
    if isinstance(written, int):
        if written < 0:
            raise ValueError(f"a duration cannot be negative. Got {written}.")
        return written, "steps"
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ep|%)", written)
    if parts is None:
        raise ValueError(
            f"a duration is a number of steps (1250), of epochs ('10ep') or a share of the run ('5%'). Got {written!r}."
        )
    return float(parts[1]), parts[2]


def _as_tuple(given: object) -> object:
    return tuple(given) if isinstance(given, list) else given


Milestones = Annotated[tuple[Duration, ...], BeforeValidator(_as_tuple)]
WHOLE_RUN = Duration("100%")
DEFAULT_FACTOR = 0.1  # of SimMIM and of MoCo's linear protocol


class Schedule(Config):
    """A value over the run: `start` during `delay`, the way to `value` during `warmup`, then the decay to `final`.

    With t = step - delay, W = warm-up steps, x = t / W (t / (W - 1) if `inclusive`), D = `decay_for` or else all steps
    after the warm-up, u = min((t - W) / D, 1) (over D - 1 if `reach_final`), all counted in whole epochs instead of
    steps if `every` is `epoch`:

        t < 0:   start
        t < W:   start + (value - start) * x                      (`rise: linear`)
                 start + (value - start) * (1 - cos(pi * x)) / 2  (`cosine`)
                 start + (value - start) * exp(-5 * (1 - x)^2)    (`exponential`)
        t >= W:  value                                            if `final` is null
                 final + (value - final) * (1 + cos(pi * u)) / 2  (`decay: cosine`)
                 value + (final - value) * u                      (`linear`)
                 value * cos(u * arccos(final / value))           (`cosine_arc`, AdaMatch)
                 value * cos(7 * pi * u / 16)                     (`cosine_7_16`, FixMatch)
                 value * factor^(milestones that t has reached)   (`steps`)
    """

    shorthand: ClassVar[str | None] = "value"

    value: float
    """The value after the warm-up."""
    final: float | None = None
    """The value that the decay ends with; null keeps `value`."""
    warmup: Duration = Duration(0)
    """How long the value takes from `start` to `value`."""
    start: float = 0.0
    """The first value of the warm-up."""
    inclusive: bool = False
    """Whether the last warm-up step already has `value` (numpy.linspace, DINO), or the step after it (MoCo, MAE)."""
    decay: Literal["cosine", "linear", "cosine_arc", "cosine_7_16", "steps"] = "cosine"
    """The way from `value` to `final`; `cosine_7_16` ends at 0.195 * value and ignores `final`."""
    every: Literal["step", "epoch"] = "step"
    """Whether the value changes with every step or only when an epoch begins."""
    delay: Duration = Duration(0)
    """How long `start` is held first; warm-up, decay and milestones are counted from its end."""
    rise: Literal["linear", "cosine", "exponential"] = "linear"
    """The way from `start` to `value`; `exponential` begins at exp(-5) of it (Temporal Ensembling, Mean Teacher)."""
    decay_for: Duration | None = None
    """How long the decay takes, `final` afterwards; null is to the end of the run."""
    milestones: Milestones = ()
    """Where `decay: steps` multiplies the value by `factor`."""
    factor: float = Field(DEFAULT_FACTOR, gt=0, le=1)
    """What `decay: steps` multiplies with at each milestone."""
    reach_final: bool = False
    """Whether the last step of the decay already has `final` (DINOv3), or the step after it (DINO, MAE)."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Schedule:
        if self.inclusive and self.warmup.is_zero:
            raise ValueError(
                "inclusive applies to the last warm-up step, but warmup is 0. Set warmup or leave inclusive out."
            )
        if self.decay == "steps":
            if not self.milestones:
                raise ValueError("milestones are missing: decay=steps needs at least one, for instance ['100ep'].")
            if self.final is not None:
                raise ValueError(
                    "final has no effect with decay=steps: milestones and factor define the decay. Leave it out."
                )
        elif self.milestones or self.factor != DEFAULT_FACTOR:
            setting = "milestones" if self.milestones else "factor"
            raise ValueError(f"{setting} belongs to decay=steps. Got decay={self.decay}.")
        decays = self.decay == "cosine_7_16" or self.final is not None
        for setting, is_set in (("decay_for", self.decay_for is not None), ("reach_final", self.reach_final)):
            if is_set and self.decay == "steps":
                raise ValueError(
                    f"{setting} has no effect with decay=steps, whose milestones set the steps. Leave it out."
                )
            if is_set and not decays:
                raise ValueError(
                    f"{setting} applies to the way to final, but final is not set. Set it, or leave this out."
                )
        self._check_arc()
        return self

    def numbers(self) -> dict[str, float]:
        """Its extreme values, by the key that sets each: all others lie between them."""
        numbers = {"value": self.value}
        if not (self.warmup.is_zero and self.delay.is_zero):
            numbers["start"] = self.start
        if self.decay == "steps":
            numbers["value after the last milestone"] = self.value * self.factor ** len(self.milestones)
        elif self.decay == "cosine_7_16":
            numbers["value at the end"] = self._decayed(1.0)
        elif self.final is not None:
            numbers["final"] = self.final
        return numbers

    def _check_arc(self) -> None:
        if self.decay != "cosine_arc":
            return
        if self.final is None or self.value == 0 or abs(self.final) > abs(self.value):
            raise ValueError(
                f"final must lie between -value and value for decay=cosine_arc, and value must not be 0. "
                f"Got final={self.final} and value={self.value:g}."
            )

    def __call__(self, progress: Progress) -> float:
        """The value at `progress`."""
        now = progress.step if self.every == "step" else math.floor(progress.epoch + 1e-9)
        now -= self._length(self.delay, progress)
        warmup = self._length(self.warmup, progress)
        if now < 0:
            return self.start
        if now < warmup:
            return self._rising(now, max(warmup - self.inclusive, 1))
        if self.decay == "steps":
            return self.value * self.factor ** sum(
                now >= self._length(milestone, progress) for milestone in self.milestones
            )
        if self.decay_for is None:
            length = self._length(WHOLE_RUN, progress) - self._length(self.delay, progress) - warmup
        else:
            length = self._length(self.decay_for, progress)
            if now - warmup >= length:
                return self._decayed(1.0)
        return self._decayed(min((now - warmup) / max(length - self.reach_final, 1), 1.0))

    def _length(self, duration: Duration, progress: Progress) -> int:
        steps = duration.steps(progress)
        return steps if self.every == "step" else round(steps / progress.steps_per_epoch)

    def _rising(self, now: int, length: int) -> float:
        if self.rise == "linear":
            return self.start + (self.value - self.start) * now / length
        share = (1 - math.cos(math.pi * now / length)) / 2
        if self.rise == "exponential":
            share = math.exp(-5 * (1 - now / length) ** 2)
        return self.start + (self.value - self.start) * share

    def _decayed(self, done: float) -> float:
        if self.decay == "cosine_7_16":
            return self.value * math.cos(7 * math.pi * done / 16)
        if self.final is None:
            return self.value
        if self.decay == "cosine_arc":
            return self.value * math.cos(done * math.acos(self.final / self.value))
        if self.decay == "linear":
            return self.value + (self.final - self.value) * done
        return self.final + (self.value - self.final) * (1 + math.cos(math.pi * done)) / 2

    def times(self, factor: float) -> Schedule:
        """The same schedule with `value` multiplied; `start` and `final` stay, as the official learning rates do."""
        scaled = self.model_copy(update={"value": self.value * factor})
        scaled._check_arc()
        return scaled


def _moves(momentum: Schedule) -> Schedule:
    if all(number == 1 for number in momentum.numbers().values()):
        raise ValueError("value must be below 1: an average that keeps all of itself never moves. Only final may be 1.")
    return momentum


Momentum = Annotated[Schedule, InRange(ge=0, le=1), AfterValidator(_moves)]
"""Share of itself that a moving average keeps at an update: 1 at the end of a run, as in DINO, but not throughout."""
