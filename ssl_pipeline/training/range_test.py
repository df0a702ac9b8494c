"""Learning-rate range test (Smith, 2015, https://arxiv.org/abs/1506.01186): the rate grows from step to step.

Real steps of the run, from its beginning, with rates that grow by a factor until the loss does. Nothing is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

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
SIGNS = ("feature_std", "prototypes_used")  # of a collapse, which makes some losses small
NEARLY = 0.8  # of the steepest slope
SLOPE_STEPS = 7  # over which a slope is taken: half a power of ten


@dataclass(frozen=True)
class RangeTest:
    """What was seen: effective learning rates, ascending, with the loss of the step at each, and that of the same step
    without learning.

    smoothed: moving average of the loss less its drift without learning. per_setting: effective rate / `optim.lr`, at
    this global batch. note: why the test ended.
    """

    rates: list[float]
    losses: list[float]
    alone: list[float]
    smoothed: list[float]
    per_setting: float
    note: str

    @property
    def lowest(self) -> int:
        """The step with the lowest smoothed loss."""
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    @property
    def steepest(self) -> int | None:
        """The step in the middle of those over which the smoothed loss fell fastest; None if it never really fell.

        Of steps over which it fell nearly as fast the first: where a loss falls alike over a power of ten, chance would
        choose, and the lower rate is the safer one. Not the rate of the lowest
        loss, or a tenth of it: with batch norm even rates far too high let a loss fall.
        """
        if len(self.smoothed) < FEWEST_STEPS or self.lowest < SLOPE_STEPS:
            return None
        falls = [
            self.smoothed[step] - self.smoothed[step + SLOPE_STEPS] for step in range(self.lowest - SLOPE_STEPS + 1)
        ]
        first = next(step for step, fall in enumerate(falls) if fall >= NEARLY * max(falls))
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

    The same steps are made at a rate of 0 first: some losses move by themselves, as a teacher's centre or a queue does,
    and what they do without learning says nothing about a rate. A backbone that `optim.freeze_backbone_for` would
    freeze learns here. The run's schedules of the rate are left out.
    """
    optim = run.optim.model_copy(update={"freeze_backbone_for": Duration(0)})
    run = replace(run, optim=optim)
    if run.train.sync_batch_norm:
        synchronize_batch_norm(run.method, run.accelerator.device)
    run.method.to(run.accelerator.device)
    rates = rates_of(optim, min(STEPS, run.clock.total_steps))
    network, _ = wrap(run.accelerator, run.method, build_optimizer(run.method, optim))
    tensors = [*run.method.parameters(), *run.method.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    alone = list[_Step]()
    say("First the loss without learning:")
    for number, made in enumerate(_steps(run, network, [0.0] * len(rates))):
        alone.append(made)
        if number % 10 == 0:
            say(f"step {number + 1} of {len(rates)}: loss {made.loss:.4f}")
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    without, losses, note = [made.loss for made in alone], list[float](), "the end of the range was reached"
    say("Now with learning:")
    try:
        for number, made in enumerate(_steps(run, network, rates)):
            losses.append(made.loss)
            if number % 10 == 0:
                say(f"step {number + 1} of {len(rates)}: learning rate {rates[number]:.3g}, loss {made.loss:.4f}")
            if number >= FEWEST_STEPS and is_over(smooth(less_drift(losses, without))):
                note = f"at {rates[number]:.3g} the loss had risen too far"
                break
            if fallen := made.collapses_beside(alone[number]):
                note = f"at {rates[number]:.3g} {fallen} was below half of what it is without learning"
                break
    except BrokenStepError:
        note = f"at {rates[len(losses)]:.3g} the loss or the gradient was not finite"
    seen, effective = len(losses), optim.effective_lr(run.clock.global_batch)
    smoothed = smooth(less_drift(losses, without))
    return RangeTest(rates[:seen], losses, without[:seen], smoothed, effective.value / optim.lr.value, note)


@dataclass(frozen=True)
class _Step:
    """What a step of the test shows: its loss, and those of SIGNS that the method measures."""

    loss: float
    signs: Mapping[str, float]

    def collapses_beside(self, alone: _Step) -> str:
        """The sign that has fallen below half of that of the step without learning, if one has."""
        return next((name for name, value in self.signs.items() if value < alone.signs[name] / 2), "")


def less_drift(losses: Sequence[float], alone: Sequence[float]) -> list[float]:
    """The losses less what they have moved without learning since the first step; images and draws are the same."""
    return [loss - (moved - alone[0]) for loss, moved in zip(losses, alone, strict=False)]


def _steps(run: Run, network: nn.Module, rates: Sequence[float]) -> Iterator[_Step]:
    """Each step at these effective rates, from the beginning of the run, with an optimizer of its own."""
    device, clock = run.accelerator.device, run.clock
    optimizer = run.accelerator.prepare_optimizer(build_optimizer(run.method, run.optim))
    with TemporaryDirectory(prefix="ssl_pipeline-range-test-") as nowhere:
        step = TrainingStep(
            run,
            network,
            optimizer,
            lr=run.optim.effective_lr(clock.global_batch),
            checks=StepChecks(run.index),
            lag=0,
            times=StepTimes(device, every=0),
            bad_samples=BadSampleLog(
                Path(nowhere) / "bad_samples.jsonl", budget=run.data.bad_sample_budget, total=len(run.index)
            ),
            keepalive=lambda: None,
            requested=lambda: 0,
            has_row=lambda position: True,  # so that the signs are those of all processes
        )
        stream = open_batches(run, 0, lambda: None)
        for number, rate in enumerate(rates):
            step.lr = Schedule(value=rate)
            result = step(stream, number * clock.global_batch)
            own = torch.stack([output.loss for output in result.outputs]).mean()
            metrics = result.outputs[-1].metrics
            yield _Step(float(mean_over_ranks(own)), {name: float(metrics[name]) for name in SIGNS if name in metrics})
