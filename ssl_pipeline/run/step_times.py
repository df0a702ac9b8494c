"""Where the time of a training step goes: measured in some steps, free in all others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise

import torch

PHASES = ("wait", "copy", "augment", "forward", "backward", "optimizer", "after_step")

Mark = float | torch.cuda.Event


class StepTimes:
    """Seconds of each phase of a step, taken in every `every`-th step; 0 takes none.

    A phase lasts from the end of the one before it, so the phases of a step add up to the step. On a GPU their ends are
    events in its queue, for which nobody waits before `read`: `wait` is then the time in which the device itself had
    nothing to do. The first step after a start is never measured, since it compiles and warms up.
    """

    def __init__(self, device: torch.device, *, every: int) -> None:
        self.every = every
        self._named = False
        self._on_gpu = device.type == "cuda"
        self._started = False
        self._marks: list[tuple[str, Mark]] | None = None
        self._measured: list[list[tuple[str, Mark]]] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._num_steps = 0

    def start(self, step: int, *, named: bool = False) -> None:
        """Begin step number `step`; `named` phases are marked in a profiler's trace."""
        self._named = named
        is_due = self.every > 0 and step % self.every == 0 and self._started
        self._started = True
        self._marks = [("", self._now())] if is_due else None
        if self._marks is not None:
            self._measured.append(self._marks)

    def phase(self, name: str) -> AbstractContextManager[object]:
        """A part of the step; a name that comes again, as those of micro-batches do, adds up."""
        return self._measured_phase(name) if self._marks is not None or self._named else nullcontext()

    @contextmanager
    def _measured_phase(self, name: str) -> Iterator[None]:
        with torch.profiler.record_function(name) if self._named else nullcontext():
            yield
        if self._marks is not None:
            self._marks.append((name, self._now()))

    def read(self) -> dict[str, float]:
        """`seconds_PHASE` of a step on average over those measured since the last call; empty if there were none."""
        steps, self._measured = self._measured, []
        if not steps:
            return {}
        seconds = dict.fromkeys(PHASES, 0.0)
        for marks in steps:
            for (_, begin), (name, end) in pairwise(marks):
                seconds[name] += _seconds_between(begin, end)
        for name in PHASES:
            self._seconds[name] += seconds[name]
        self._num_steps += len(steps)
        return {f"seconds_{name}": total / len(steps) for name, total in seconds.items()}

    def summary(self) -> str:
        """One line on all steps that were read; empty if there were none."""
        total = sum(self._seconds.values())
        if not total:
            return ""
        parts = ", ".join(f"{name.replace('_', ' ')} {share / total:.1%}" for name, share in self._seconds.items())
        steps = f"{self._num_steps} measured steps" if self._num_steps > 1 else "1 measured step"
        return f"A step took {total / self._num_steps:.3g} s on average over {steps}: {parts}."

    def _now(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    assert isinstance(end, float)
    return end - begin
