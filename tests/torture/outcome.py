"""What a part of the torture found: how much was tried, and what did not go as promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """Trials of one kind; `broken` has a line for each promise that was not kept."""

    name: str
    promise: str
    tried: int = 0
    broken: list[str] = field(default_factory=list)

    def count(self, failure: str | None) -> None:
        """Count a trial; failure: what went wrong with it, None if nothing did."""
        self.tried += 1
        if failure is not None:
            self.broken.append(failure)


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each kind of trial, and below it what was broken."""
    rows = [("what", "tried", "kept", "promise")]
    rows += [(o.name, f"{o.tried:,}", f"{o.tried - len(o.broken):,}", o.promise) for o in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {tried:>{widths[1]}}  {kept:>{widths[2]}}  {promise}"
        for name, tried, kept, promise in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    broken = [f"{outcome.name}: {told}" for outcome in outcomes for told in outcome.broken]
    return "\n".join([*lines, *([""] if broken else []), *broken])
