"""A torch profiler trace of a few steps of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

UNPROFILED_STEPS = 3  # in which caches fill, kernels are chosen and code is compiled
WARM_UP_STEPS = 2  # in which the profiler itself gets going


class Profile:
    """Records `num_steps` steps, after the first few, into a Chrome trace in `folder`; 0 records none.

    A run that ends early leaves a trace of the steps it made, or says that it made too few.
    """

    def __init__(
        self, folder: Path, *, num_steps: int, first_step: int, device: torch.device, report: Callable[[str], None]
    ) -> None:
        self._folder, self._report = folder, report
        self._num_steps, self._recorded = num_steps, 0
        self._step = first_step
        self._first_recorded = first_step + UNPROFILED_STEPS + WARM_UP_STEPS + 1
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler: profile | None = None

    def __enter__(self) -> Profile:
        if self._num_steps:
            self._profiler = profile(
                activities=self._activities,
                schedule=schedule(wait=UNPROFILED_STEPS, warmup=WARM_UP_STEPS, active=self._num_steps, repeat=1),
                on_trace_ready=self._write,
                acc_events=True,  # else torch warns that it forgets earlier cycles, of which there are none
            )
            self._profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def active(self) -> bool:
        """Whether steps are recorded now or will be."""
        return self._profiler is not None

    def step_done(self) -> None:
        """To be called after each step."""
        if self._profiler is None:
            return
        self._step += 1
        self._recorded += self._step >= self._first_recorded
        self._profiler.step()
        if self._recorded == self._num_steps:
            self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            if not self._recorded:
                self._report(f"train.profile: the run ended before step {self._first_recorded}; nothing was recorded.")

    def _write(self, profiler: profile) -> None:
        if self._recorded:
            last = self._first_recorded + self._recorded - 1
            path = self._folder / f"steps-{self._first_recorded}-to-{last}.json.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            self._report(
                f"Trace of steps {self._first_recorded} to {last}: {path} (open it in https://ui.perfetto.dev)"
            )
