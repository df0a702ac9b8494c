"""The rows of a run: when one is due, and what stands in it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ssl_pipeline.distributed import copy_from_first_rank, max_over_ranks, mean_over_ranks
from ssl_pipeline.run.interruption import WithKeepalive
from ssl_pipeline.run.step_times import StepTimes
from ssl_pipeline.run.tracking import Tracker
from ssl_pipeline.training.loader_advice import LoaderWatch, loader_advice, supply_of
from ssl_pipeline.training.run import Monitor, Run
from ssl_pipeline.training.step import StepResult


class Reporter:
    """Logs a row now and then: the losses and metrics of its step, the speed since the row before, the monitors."""

    def __init__(self, run: Run, tracker: Tracker, times: StepTimes, keepalive: Callable[[], None]) -> None:
        self._run, self._clock, self._tracker, self._times = run, run.clock, tracker, times
        self._keepalive = keepalive
        device = run.accelerator.device
        self._loader = LoaderWatch(lambda: loader_advice(run.data, supply_of(run.index, device), device))
        self.start_interval()

    def start_interval(self) -> None:
        """Count images and seconds from now on."""
        self._started, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def is_due(self, position: int) -> bool:
        """Whether the step that ends at `position` gets a row."""
        step = self._clock.progress(position).step
        every = self._run.train.log_every  # 0: never
        due = step == 1 or (every > 0 and step % every == 0) or self._clock.is_last(position)
        return due or bool(self._due_monitors(position))

    def report(self, result: StepResult, position: int) -> None:
        """Count a step that ends at `position`, and log its row if it is due."""
        step = self._clock.progress(position).step
        self._waited += result.waited
        self._steps += 1
        if self.is_due(position):
            seconds, row = self._row(result, position)
            if self._run.output.directory is not None:  # the other ranks print nothing
                advice = self._loader.observe(steps=self._steps, seconds=seconds, data_wait=row["data_wait"])
                if advice is not None:
                    self._tracker.message(advice)
            self._tracker.log(row | self._monitored(position))
            self.start_interval()
        self._tracker.advance(step)
        self._keepalive()

    def _row(self, result: StepResult, position: int) -> tuple[float, dict[str, float | int]]:
        """The seconds since the row before, and the row, without what monitors add to it."""
        outputs, done = result.outputs, self._clock.progress(position)
        names = ["loss", *outputs[0].metrics]
        values = [torch.stack([o.loss, *(o.metrics[name].float() for name in names[1:])]) for o in outputs]
        means = mean_over_ranks(torch.stack(values).mean(dim=0)).tolist()  # here the host waits for the device
        seconds = time.perf_counter() - self._started
        row: dict[str, float | int] = {"step": done.step, "epoch": done.epoch, "position": position}
        row |= dict(zip(names, means, strict=True))
        row["learning_rate"] = result.learning_rate
        row["gradient_norm"] = float(result.gradient_norm)
        row["images_per_second"] = self._steps * self._clock.global_batch / seconds
        # the others wait for the rank whose loader is slowest
        row["data_wait"] = float(max_over_ranks(outputs[0].loss.new_tensor(self._waited / seconds)))
        return seconds, row | self._times.read()

    def _monitored(self, position: int) -> dict[str, float]:
        monitors = self._due_monitors(position)
        if monitors:  # plain batch norm has statistics of its own on each rank; saved are those of rank 0
            copy_from_first_rank(self._run.method.backbone.buffers())
        row: dict[str, float] = {}
        for monitor in monitors:
            row |= monitor(WithKeepalive(self._run.method.backbone, self._keepalive), self._clock.progress(position))
        return row

    def _due_monitors(self, position: int) -> list[Monitor]:
        last = self._clock.is_last(position)
        return [monitor for monitor in self._run.monitors if last or self._clock.is_due(monitor.every, position)]
