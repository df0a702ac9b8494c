"""One optimizer step: micro-batches in, forward and backward, the update and what follows it.

The host waits for a GPU only to read the check of the step before, which is there by then; and where torch itself
waits: each batch norm of train.sync_batch_norm asks which processes had images, and with train.precision=fp16 the
GradScaler asks before a step of LARS (the fused AdamW and SGD look at the overflow on the device).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ssl_pipeline.data.bad_samples import BadSampleLog
from ssl_pipeline.data.batches import StreamBatch, make_batch
from ssl_pipeline.distributed import rank
from ssl_pipeline.methods.base import StepOutput
from ssl_pipeline.optim.gradient_norms import GradientNorms
from ssl_pipeline.optim.optimizer import prepare_gradients, write_values
from ssl_pipeline.randomness import seed_everything
from ssl_pipeline.run.step_times import StepTimes
from ssl_pipeline.schedule import Progress, Schedule
from ssl_pipeline.training.compiling import compiles_colours
from ssl_pipeline.training.copying import Copies
from ssl_pipeline.training.run import Run
from ssl_pipeline.training.statistics import NormStatistics
from ssl_pipeline.training.step_checks import StepChecks


@dataclass(frozen=True)
class StepResult:
    """What a step leaves to report; tensors stay on the device until they are read."""

    outputs: list[StepOutput]
    learning_rate: float
    gradient_norm: Tensor
    waited: float
    """Seconds until the images were there."""
    left_out: int
    """How many steps of the run were left out so far, this one perhaps among them."""
    signal_number: int
    """The signal that any rank had received, by the checks read so far; 0 if none."""
    layer_norms: Mapping[str, Tensor] = field(default_factory=dict)
    """Gradient norms before clipping by layer, for a step with a row and if `train.gradient_norms` wants them."""


@dataclass
class TrainingStep:
    """Makes steps on this rank's share of the images; `lag`: by how many steps checks may be read late.

    statistics: of the batch norms, where a broken step may be left out; it needs checks without a lag.
    """

    run: Run
    network: nn.Module
    optimizer: torch.optim.Optimizer
    lr: Schedule
    checks: StepChecks
    lag: int
    times: StepTimes
    bad_samples: BadSampleLog
    keepalive: Callable[[], None]
    requested: Callable[[], int]
    """The signal that asks this process to stop, 0 if none."""
    statistics: NormStatistics | None = None
    norms: GradientNorms | None = None
    has_row: Callable[[int], bool] = lambda position: False
    """Whether the step that ends at a position is logged, so that `norms` and metrics over all processes are wanted."""

    def __post_init__(self) -> None:
        device, steps = self.run.accelerator.device, self.run.clock.total_steps
        self.copies = Copies(device, own_stream=self.run.train.copy_stream)
        self.compiles_colours = compiles_colours(device, steps=steps)

    def __call__(self, stream: Iterator[StreamBatch], position: int) -> StepResult:
        """Make the step that begins at `position`.

        Raises BrokenStepError if it, or an earlier one whose check is read now, is not finite.
        """
        is_logged = self.has_row(position + self.run.clock.global_batch)
        progress = replace(self.run.clock.progress(position), is_logged=is_logged)
        if self.statistics is not None:
            self.statistics.keep()
        outputs, sample_ids, waited = self._accumulate(stream, progress)
        with self.times.phase("optimizer"):
            learning_rate = write_values(self.optimizer, self.run.optim, self.lr, progress)
            gradient_norm, layer_norms = self._prepare(outputs, sample_ids, position, is_logged=is_logged)
            received = self.checks.read(lag=self.lag)
            if self.checks.is_left_out:
                self._leave_out()
            else:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if not self.checks.is_left_out:
            with self.times.phase("after_step"), torch.no_grad():
                self.run.method.after_step([output.carry for output in outputs], progress)
        left_out = self.checks.left_out
        return StepResult(outputs, learning_rate, gradient_norm, waited, left_out, received, layer_norms)

    def _leave_out(self) -> None:
        """Take back what the forward passes of this step changed; random numbers are seeded again in each step."""
        assert self.statistics is not None
        self.statistics.restore()
        if self.run.accelerator.scaler is not None:
            self.run.accelerator.scaler.update()  # as after a step that it leaves out itself

    def _accumulate(self, stream: Iterator[StreamBatch], progress: Progress) -> tuple[list[StepOutput], Tensor, float]:
        """Forward and backward over the micro-batches of one step; the gradients are those of their mean loss."""
        run, phase = self.run, self.times.phase
        outputs, sample_ids, waited = list[StepOutput](), list[Tensor](), 0.0
        for micro in range(run.train.accumulate):
            started = time.perf_counter()
            with phase("wait"):
                images = next(stream)
            waited += time.perf_counter() - started
            self.bad_samples.record(images.bad)
            with phase("copy"):
                images = self.copies(images)
            with phase("augment"):
                batch = make_batch(
                    images, run.augment, mean=run.data.mean, std=run.data.std, compile=self.compiles_colours
                )
            seed_everything(run.seed, progress.step, rank(), micro)
            last = micro == run.train.accumulate - 1
            with nullcontext() if last else run.accelerator.no_sync(self.network):
                with phase("forward"):
                    output: StepOutput = self.network(batch, progress)
                with phase("backward"):
                    run.accelerator.backward(output.loss / run.train.accumulate)
            outputs.append(StepOutput(output.loss.detach(), output.metrics, output.carry))
            sample_ids.append(batch.sample_ids)
            self.keepalive()
        return outputs, torch.cat(sample_ids), waited

    def _prepare(
        self, outputs: list[StepOutput], sample_ids: Tensor, position: int, *, is_logged: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Make the gradients ready for the optimizer and start the check of the step; returns the gradient norms."""
        scaler = self.run.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer.optimizer)  # type: ignore[attr-defined]
        layer_norms: Mapping[str, Tensor] = {}
        if self.norms is not None and is_logged:
            layer_norms = dict(zip(self.norms.names, self.norms().unbind(), strict=True))
        loss = torch.stack([output.loss for output in outputs]).mean()
        gradient_norm = prepare_gradients(self.optimizer, self.run.optim, self.run.clock.progress(position))
        self.checks.add(
            self.run.clock.steps_made(position),
            loss=loss,
            gradient_norm=gradient_norm,
            sample_ids=sample_ids,
            watched=loss if scaler is not None else loss + gradient_norm,  # a scaler leaves such steps out itself
            signal_number=self.requested(),
        )
        return gradient_norm, layer_norms
