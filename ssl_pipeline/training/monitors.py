"""The monitors of a run: when each measures, what happens when one fails, and what is said when its figure falls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from torch import Tensor, nn

from ssl_pipeline.config import failure_sentence, printable
from ssl_pipeline.distributed import copy_from_first_rank, peer_failure
from ssl_pipeline.run.doctor.learning import FALL_HELPS, fell_below
from ssl_pipeline.schedule import Duration, Progress
from ssl_pipeline.training.monitor_cost import MonitorCost
from ssl_pipeline.training.run import Monitor, Run

TOLD = {
    "knn_top1": "k-NN top-1 {:.2f} %",
    "classifier_top1": "classifier top-1 {:.2f} %",
    "rankme": "RankMe {:.1f}",
    "alpha": "alpha-ReQ {:.2f}",
}
"""Figures that are logged as they are found; all are in metrics.jsonl."""
OnError = Literal["skip", "stop"]
Figures = dict[str, float | int | str]


@dataclass(frozen=True)
class Watched:
    """A monitor with the run's way of calling it.

    name: its section of the settings. at_start: whether it measures before the first step too. on_error: `skip` says in
    one line what went wrong and trains on, `stop` ends the run. compared: figures in percent, by what they are called,
    that are compared with the start.
    """

    monitor: Monitor
    name: str = "a monitor"
    at_start: bool = False
    on_error: OnError = "stop"
    compared: Mapping[str, str] = field(default_factory=dict)

    @property
    def every(self) -> Duration:
        return self.monitor.every

    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        return self.monitor(backbone, progress)


class Monitors:
    """Those of a run, with their figures before its first step (`start`, kept in checkpoints)."""

    def __init__(
        self, run: Run, *, say: Callable[[str], None], keepalive: Callable[[], None], start: Mapping[str, float]
    ) -> None:
        self._run, self._say, self._keepalive = run, say, keepalive
        self._all = [monitor if isinstance(monitor, Watched) else Watched(monitor) for monitor in run.monitors]
        self.start = dict(start)
        self._told: dict[str, str] = {}
        self._cost = MonitorCost(run.clock.total_steps)

    def are_due(self, position: int) -> bool:
        """Whether one measures after the step that ends at `position`."""
        return bool(self._due(position))

    def measure(self, position: int) -> Figures:
        """What those that are due add to the row of the step that ends at `position`; all processes call it."""
        due, began = self._due(position), perf_counter()
        figures = self._measured(due, position)
        step = self._run.clock.progress(position).step
        if due and not self._run.clock.is_last(position):
            names = [watched.name for watched in due]
            told = self._cost.observe(names, step=step, began=began, ended=perf_counter())
            if told is not None:
                self._say(told)
        self._tell(figures, f"step {step}")
        self._compare(figures, step)
        return figures

    def measure_start(self) -> Figures:
        """The figures before the first step of the monitors that want them; an empty mapping if none does."""
        figures = self._measured([watched for watched in self._all if watched.at_start], 0)
        self._tell(figures, "before the first step")
        compared = {metric for watched in self._all for metric in watched.compared}
        self.start = {name: float(value) for name, value in figures.items() if name in compared}
        return figures

    def _due(self, position: int) -> list[Watched]:
        clock = self._run.clock
        last = clock.is_last(position)
        return [watched for watched in self._all if last or clock.is_due(watched.every, position)]

    def _measured(self, monitors: list[Watched], position: int) -> Figures:
        figures: Figures = {}
        progress = self._run.clock.progress(position)
        if not monitors:
            return figures
        # plain batch norm has statistics of its own on each rank; saved are those of rank 0
        copy_from_first_rank(self._run.method.backbone.buffers())
        backbone = _WithKeepalive(self._run.whole_backbone(), self._keepalive)
        for watched in monitors:
            try:
                figures |= watched(backbone, progress)
            except Exception as error:
                if watched.on_error == "stop" or peer_failure(error) is not None:
                    raise
                reason = printable(failure_sentence(error))
                figures[f"{watched.name}_error"] = reason
                self._say(f"{watched.name} is skipped at step {progress.step} (on_error=skip): {reason}")
        return figures

    def _tell(self, figures: Figures, when: str) -> None:
        """Log the main figures."""
        told = [form.format(float(figures[name])) for name, form in TOLD.items() if name in figures]
        if told:
            self._say(f"{when}: {', '.join(told)}")

    def _compare(self, figures: Figures, step: int) -> None:
        """Say what is a point or more below the start, or no longer is; nothing twice that has not changed."""
        for watched in self._all:
            for metric, name in watched.compared.items():
                if metric not in figures or metric not in self.start:
                    continue
                start, now, told = self.start[metric], float(figures[metric]), self._told.pop(metric, None)
                if fell_below(start, now):
                    self._told[metric] = f"{now:.1f}"
                    if told != self._told[metric]:
                        self._say(
                            f"{name} fell from {start:.1f} % at the start to {now:.1f} % at step {step}. {FALL_HELPS}"
                        )
                elif told is not None:
                    self._say(f"{name} is {now:.1f} % at step {step}, no longer below the start ({start:.1f} %).")


class _WithKeepalive(nn.Module):
    """A backbone that sends a keepalive with each batch: a monitor may well take longer than `hang_timeout`."""

    def __init__(self, backbone: nn.Module, keepalive: Callable[[], None]) -> None:
        super().__init__()
        self.backbone, self.keepalive = backbone, keepalive

    def forward(self, images: Tensor) -> Tensor:
        self.keepalive()
        return self.backbone(images)
