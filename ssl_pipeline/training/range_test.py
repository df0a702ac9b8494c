"""Learning-rate range test (Smith, 2015, https://arxiv.org/abs/1506.01186): the rate grows from step to step.

Real steps of the run, from its beginning, with rates that grow by a factor until the loss does. Nothing is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ssl_pipeline.data.bad_samples import BadSampleLog
from ssl_pipeline.distributed import mean_over_ranks
from ssl_pipeline.modules.sync_batch_norm import synchronize_batch_norm
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer
from ssl_pipeline.run.step_times import StepTimes
from ssl_pipeline.schedule import Duration, Schedule
from ssl_pipeline.training.batches import open_batches
from ssl_pipeline.training.parallel import wrap
from ssl_pipeline.training.run import Run
from ssl_pipeline.training.step import TrainingStep
from ssl_pipeline.training.step_checks import BrokenStepError, StepChecks

STEPS = 100  # 14 for each power of ten
RANGES = {"adamw": (1e-7, 1.0), "sgd": (1e-5, 100.0), "lars": (1e-4, 1000.0)}
SMOOTHING = 0.9  # share of the moving average that a step keeps
FEWEST_STEPS = 10
GIVES_UP = 0.5  # of how far the smoothed loss has fallen: once it has risen by so much and more again, it is over
SLOPE_STEPS = 7  # over which a slope is taken: half a power of ten


@dataclass(frozen=True)
class RangeTest:
    """What was seen: effective learning rates, ascending, with the loss of the step at each, and its moving average.

    per_setting: effective rate / `optim.lr`, at this global batch. note: why the test ended.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    per_setting: float
    note: str

    @property
    def lowest(self) -> int:
        """The step with the lowest smoothed loss."""
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    @property
    def steepest(self) -> int | None:
        """The step in the middle of those over which the smoothed loss fell most; None if it never really fell.

        Not the rate of the lowest loss, or a tenth of it: with batch norm even rates far too high let a loss fall.
        """
        if len(self.smoothed) < FEWEST_STEPS or self.lowest < SLOPE_STEPS:
            return None
        starts = range(self.lowest - SLOPE_STEPS + 1)
        first = min(starts, key=lambda step: self.smoothed[step + SLOPE_STEPS] - self.smoothed[step])
        return first + SLOPE_STEPS // 2

    @property
    def suggestion(self) -> float | None:
        """For `optim.lr`: the rate at which the smoothed loss fell fastest; None if it never did."""
        return None if self.steepest is None else self.rates[self.steepest] / self.per_setting


def smooth(losses: Sequence[float]) -> list[float]:
    """The moving average of losses without the pull of its start: sum of SMOOTHING^(t - i) l_i over that of weights."""
    found, total, weight = list[float](), 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        found.append(total / weight)
    return found


def is_over(smoothed: Sequence[float]) -> bool:
    """Whether the loss has risen again by more than half of what it had fallen, or of its size if it never fell."""
    first, best, now = smoothed[0], min(smoothed), smoothed[-1]
    fallen = first - best
    return now > (first if fallen <= 0 else best) + max(GIVES_UP * fallen, 0.1 * abs(first))


def rates_of(optim: OptimConfig, steps: int) -> list[float]:
    """Effective rates for this many steps, growing by a factor over the range that suits the update rule."""
    low, high = RANGES[optim.name]
    return [low * (high / low) ** (number / max(steps - 1, 1)) for number in range(steps)]


def range_test(run: Run, *, say: Callable[[str], None]) -> RangeTest:
    """Make the test with the run's method, images and optimizer; all processes call it and return the same.

    A backbone that `optim.freeze_backbone_for` would freeze learns here. The run's schedules of the rate are left out.
    """
    optim = run.optim.model_copy(update={"freeze_backbone_for": Duration(0)})
    run = replace(run, optim=optim)
    device, clock = run.accelerator.device, run.clock
    if run.train.sync_batch_norm:
        synchronize_batch_norm(run.method, device)
    run.method.to(device)
    network, optimizer = wrap(run.accelerator, run.method, build_optimizer(run.method, optim))
    effective = optim.effective_lr(clock.global_batch)
    rates = rates_of(optim, min(STEPS, clock.total_steps))
    seen, losses, note = list[float](), list[float](), "the end of the range was reached"
    with TemporaryDirectory(prefix="ssl_pipeline-range-test-") as nowhere:
        step = TrainingStep(
            run,
            network,
            optimizer,
            lr=effective,
            checks=StepChecks(run.index),
            lag=0,
            times=StepTimes(device, every=0),
            bad_samples=BadSampleLog(
                Path(nowhere) / "bad_samples.jsonl", budget=run.data.bad_sample_budget, total=len(run.index)
            ),
            keepalive=lambda: None,
            requested=lambda: 0,
        )
        stream = open_batches(run, 0, lambda: None)
        for number, rate in enumerate(rates):
            step.lr = Schedule(value=rate)
            try:
                result = step(stream, number * clock.global_batch)
            except BrokenStepError:
                note = f"at {rate:.3g} the loss or the gradient was not finite"
                break
            own = torch.stack([output.loss for output in result.outputs]).mean()
            loss = float(mean_over_ranks(own))
            if not math.isfinite(loss):
                note = f"at {rate:.3g} the loss was not finite"
                break
            seen.append(rate)
            losses.append(loss)
            if number % 10 == 0:
                say(f"step {number + 1} of {len(rates)}: learning rate {rate:.3g}, loss {loss:.4f}")
            if number >= FEWEST_STEPS and is_over(smooth(losses)):
                note = f"at {rate:.3g} the loss had risen again"
                break
    return RangeTest(seen, losses, smooth(losses), effective.value / optim.lr.value, note)
