"""The rows of a run: when one is due, and what is in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ssl_pipeline.distributed import max_over_ranks, mean_over_ranks
from ssl_pipeline.run.state import LoggedRow
from ssl_pipeline.run.step_times import StepTimes
from ssl_pipeline.run.tracking import Row, Tracker
from ssl_pipeline.training.checkups import Checkups
from ssl_pipeline.training.loader_advice import LoaderWatch, loader_advice, supply_of
from ssl_pipeline.training.monitors import Monitors
from ssl_pipeline.training.run import Run
from ssl_pipeline.training.step import StepResult


class Reporter:
    """Logs a row now and then: the losses and metrics of its step, the speed since the row before, the monitors.

    A row is begun before the step is saved and finished after it: what is due is on disk before anything is measured.
    """

    def __init__(
        self,
        run: Run,
        tracker: Tracker,
        times: StepTimes,
        keepalive: Callable[[], None],
        *,
        start: Mapping[str, float],
    ) -> None:
        self._run, self._clock, self._tracker, self._times = run, run.clock, tracker, times
        self._keepalive = keepalive
        self._monitors = Monitors(run, say=tracker.message, keepalive=keepalive, start=start)
        self._checkups = Checkups(run, tracker.message)
        device = run.accelerator.device
        self._loader = LoaderWatch(lambda: loader_advice(run.data, supply_of(run.index, device), device))
        self.start_interval()

    def start_interval(self) -> None:
        """Count images and seconds from now on."""
        self._started, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def is_due(self, position: int) -> bool:
        """Whether the step that ends at `position` gets a row."""
        step = self._clock.steps_made(position)
        every = self._run.train.log_every  # 0: never
        due = step == 1 or (every > 0 and step % every == 0) or self._clock.is_last(position)
        return due or self._monitors.are_due(position)

    @property
    def start(self) -> Mapping[str, float]:
        """What the monitors found before the first step, as far as it is compared with."""
        return self._monitors.start

    def log_start(self) -> None:
        """Log a row of step 0 with what monitors find before the first step, if any is to look then."""
        if figures := self._monitors.measure_start():
            self._log({"step": 0, "epoch": 0.0, "images": 0, **figures}, 0)

    def begin(self, result: StepResult, position: int) -> LoggedRow | None:
        """Count a step that ends at `position`; its row without what monitors add to it, if it is due."""
        self._waited += result.waited
        self._steps += 1
        if not self.is_due(position):
            return None
        seconds, row = self._row(result, position)
        if self._run.output.directory is not None:  # the other ranks print nothing
            advice = self._loader.observe(steps=self._steps, seconds=seconds, data_wait=row["data_wait"])
            if advice is not None:
                self._tracker.message(advice)
        self.start_interval()
        return {**row}

    def finish(self, row: LoggedRow | None, position: int, result: StepResult | None = None) -> None:
        """Let the monitors measure that are due, log the row, and move on; without a row show the step's `result`."""
        if row is not None:
            began = time.perf_counter()
            self._log({**row, **self._monitors.measure(position)}, position)
            self._started += time.perf_counter() - began  # no time of training
        now = None
        if row is None and result is not None:
            losses, epoch, rate = [o.loss for o in result.outputs], self._clock.epoch(position), result.learning_rate
            now = partial(_between_rows, losses, epoch, rate)
        self._tracker.advance(self._clock.steps_made(position), now)
        self._keepalive()

    def _log(self, row: Row, position: int) -> None:
        self._tracker.log(row)
        self._checkups.see(row, is_last=self._clock.is_last(position))

    def log_missing(self, row: LoggedRow | None, position: int) -> None:
        """Finish the row of the step that was saved last, if the run was ended before it was logged."""
        missing = self._run.output.directory is not None and row is not None and self._tracker.is_new(row)
        if max_over_ranks(torch.tensor(float(missing), device=self._run.accelerator.device)).item():
            self.finish(row, position)

    def _row(self, result: StepResult, position: int) -> tuple[float, dict[str, float | int]]:
        """The seconds since the row before, and the row, without what monitors add to it."""
        outputs, clock = result.outputs, self._clock
        names = ["loss", *outputs[0].metrics]
        values = [torch.stack([o.loss, *(o.metrics[name].float() for name in names[1:])]) for o in outputs]
        means = mean_over_ranks(torch.stack(values).mean(dim=0)).tolist()  # here the host waits for the device
        seconds = time.perf_counter() - self._started
        row: dict[str, float | int] = {"step": clock.steps_made(position), "epoch": clock.epoch(position)}
        row["images"] = position
        row |= dict(zip(names, means, strict=True))
        row["learning_rate"] = result.learning_rate
        row["gradient_norm"] = float(result.gradient_norm)
        if self._run.train.on_nan == "skip":
            row["left_out_steps"] = result.left_out
        row |= {f"gradient_norm/{name}": float(norm) for name, norm in result.layer_norms.items()}
        row["images_per_second"] = self._steps * self._clock.global_batch / seconds
        # the others wait for the rank whose loader is slowest
        row["data_wait"] = float(max_over_ranks(outputs[0].loss.new_tensor(self._waited / seconds)))
        return seconds, row | self._times.read()


def _between_rows(losses: list[Tensor], epoch: float, learning_rate: float) -> Row:
    """What a step without a row shows: the loss is only that of this process, and the host waits for the device."""
    return {"epoch": epoch, "loss": float(torch.stack(losses).mean()), "learning_rate": learning_rate}
