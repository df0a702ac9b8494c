"""What a run has logged, as one series for each name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.config import ConfigError

AXES = ("step", "position", "epoch")  # they say where a row is
MONITORED = {  # title, and whether more is better
    "knn_top1": ("k-NN top-1 (%)", True),
    "knn_top5": ("k-NN top-5 (%)", True),
    "classifier_top1": ("classifier top-1 (%)", True),
    "classifier_top5": ("classifier top-5 (%)", True),
    "rankme": ("RankMe", True),
    "rankme_percent": ("RankMe (% of the largest possible)", True),
    "alpha": ("alpha-ReQ", None),
}
FIRST = ("loss", *MONITORED, "learning_rate", "images_per_second", "data_wait")


@dataclass(frozen=True)
class Series:
    """A number that was logged at several steps, ascending."""

    name: str
    steps: list[int]
    values: list[float]

    @property
    def title(self) -> str:
        return MONITORED[self.name][0] if self.name in MONITORED else self.name.replace("_", " ")

    @property
    def start(self) -> float | None:
        """What was measured before the first step."""
        return self.values[0] if self.steps[0] == 0 else None

    def best(self) -> tuple[float, int] | None:
        """The largest value and its step, of those of which more is better."""
        if not MONITORED.get(self.name, ("", None))[1]:
            return None
        place = max(range(len(self.values)), key=lambda number: self.values[number])
        return self.values[place], self.steps[place]


def read_series(run: Path) -> list[Series]:
    """All series of metrics.jsonl, loss and monitors first; empty if nothing was logged.

    A row that is cut short is the one that is being written. Raises ConfigError if no row can be read.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found: dict[str, Series] = {}
    rows = 0
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        rows += 1
        for name, value in row.items():
            if name not in AXES and isinstance(value, int | float) and not isinstance(value, bool):
                series = found.setdefault(name, Series(name, [], []))
                series.steps.append(step)
                series.values.append(float(value))
    if lines and not rows:
        raise ConfigError(f"{path} has no row that can be read. Is {run} the directory of a run?")
    place = {name: number for number, name in enumerate(FIRST)}
    return sorted(found.values(), key=lambda series: (place.get(series.name, len(place)), series.name))
