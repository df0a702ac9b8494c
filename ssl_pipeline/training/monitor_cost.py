"""What monitors cost relative to the training between them, as in short runs that measure every few percent."""

from __future__ import annotations

import math
from collections.abc import Sequence

FEWEST, LEAST_SECONDS = 2, 5.0  # measures, and what they take together, before anything is said
TIMES = 5  # with the advised setting the training between two measures takes this many times as long as one


class MonitorCost:
    """Adds up what measures take and what is trained between them; says once that they come too often.

    The first measure counts for nothing: what is before it is the start of the run.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._ended: float | None = None
        self._step = self._steps = self._count = 0
        self._measured = self._trained = 0.0
        self._said = False

    def observe(self, names: Sequence[str], *, step: int, began: float, ended: float) -> str | None:
        """What is to be said after a measure of these monitors between two readings of a clock, in seconds."""
        if self._ended is not None:
            self._trained += began - self._ended
            self._measured += ended - began
            self._steps += step - self._step
            self._count += 1
        self._ended, self._step = ended, step
        enough = self._count >= FEWEST and self._measured >= LEAST_SECONDS
        if self._said or not enough or self._measured <= self._trained:
            return None
        self._said = True
        each, between = self._measured / self._count, self._trained / self._count
        every = math.ceil(TIMES * each / max(self._trained / self._steps, 1e-9))
        every = 0 if every >= self._total_steps else every
        keys = " ".join(f"{name}.every={every}" for name in names)
        when = "measures only at the end" if every == 0 else f"leaves {TIMES} times as long between two"
        return (
            f"Measuring {' and '.join(names)} takes {each:.1f} s each time, the training in between {between:.1f} s. "
            f"{keys} {when}; the same command goes on with it."
        )
