"""A run as the doctor's rules see it: its rows by columns, its settings by their keys, and what follows from both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import median

from ssl_pipeline.config import ConfigError, Value, validate
from ssl_pipeline.files import JSON
from ssl_pipeline.schedule import Duration, Progress, Schedule

FEWEST_ROWS = 5  # that must agree before something is reported
FEWEST_STEPS = 20
SHARE_OF_GRACE = 0.1  # of the run: for this long a loss may look like anything

Point = tuple[int, float]
"""A step and what was logged there."""
Row = Mapping[str, object]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    rule: the rule that found it. step: where it was seen first. seen: what was seen, helps: what usually helps, a
    sentence each. settings: the keys that this is about.
    """

    rule: str
    step: int
    seen: str
    helps: str
    settings: tuple[str, ...]

    def __str__(self) -> str:
        return f"Step {self.step}: {self.seen} {self.helps}"

    def as_json(self) -> dict[str, JSON]:
        return {**asdict(self), "settings": list(self.settings)}


class Case:
    """Rows of metrics.jsonl (as far as they are of steps) with the settings of the run and those of its recipe.

    Numbers that are not finite count as null, as they do in metrics.jsonl.
    """

    def __init__(self, rows: Sequence[Row], settings: Mapping[str, Value], recipe: Mapping[str, Value] | None) -> None:
        self.start: Row = next((row for row in rows if row["step"] == 0), {})
        self.rows = [row for row in rows if _whole(row["step"]) > 0]
        self.settings, self.recipe = settings, recipe
        self._columns: dict[str, list[Point]] = {}

    def column(self, name: str) -> list[Point]:
        """Where `name` was logged, and its values that are numbers."""
        if name not in self._columns:
            self._columns[name] = self._read(name)
        return self._columns[name]

    def _read(self, name: str) -> list[Point]:
        return [(_whole(row["step"]), value) for row in self.rows if (value := number(row.get(name))) is not None]

    def setting(self, key: str) -> Value:
        """The value of a key such as `optim.lr`, or None."""
        return _below(self.settings, key)

    def schedule(self, key: str) -> Schedule | None:
        return schedule_of(self.setting(key))

    @property
    def method(self) -> str:
        return str(self.setting("method.name"))

    @cached_property
    def global_batch(self) -> int:
        """Images of an optimizer step over all processes, at the end if it has changed."""
        before, last = ({"step": 0}, *self.rows)[-2:]
        return round((images_of(last) - images_of(before)) / max(_whole(last["step"]) - _whole(before["step"]), 1))

    @property
    def micro_batch(self) -> int:
        """Images of all processes that a loss sees at once."""
        return self.global_batch // (_whole(self.setting("train.accumulate")) or 1)

    @cached_property
    def progress(self) -> Progress:
        """That of the last row, in steps of the present batch."""
        images, epoch = images_of(self.rows[-1]), number(self.rows[-1]["epoch"])
        step, num_samples = images // self.global_batch, images / epoch if epoch else float(images)
        steps, epochs = self.setting("train.steps"), number(self.setting("train.epochs"))
        # an epoch's length in images is whole; the quotient may be off by a rounding
        total = (
            _whole(steps) if steps is not None else math.ceil((epochs or 0.0) * num_samples / self.global_batch - 1e-6)
        )
        return Progress(step, max(total, step), num_samples / self.global_batch)

    @cached_property
    def grace(self) -> int:
        """Steps in which a healthy run may look like anything: the warm-up, frozen prototypes, a tenth of the run."""
        progress = self.progress
        rate, frozen = self.schedule("optim.lr"), self.setting("method.freeze_prototypes_for")
        lengths = [round(SHARE_OF_GRACE * progress.total_steps)]
        if rate is not None:
            lengths.append(rate.delay.steps(progress) + rate.warmup.steps(progress))
        if isinstance(frozen, int | str):
            lengths.append(Duration(frozen).steps(progress))
        return max(lengths)

    def lasting(self, name: str, is_sick: Callable[[float], bool]) -> list[Point]:
        """The newest values of a column, as many bad ones as are in a row; none if they are only an episode.

        Counted from the end of the grace: FEWEST_ROWS values over FEWEST_STEPS steps and 2 % of the run.
        """
        streak: list[Point] = []
        for step, value in reversed(self.column(name)):
            if step <= self.grace or not is_sick(value):
                break
            streak.append((step, value))
        streak.reverse()
        steps = max(FEWEST_STEPS, self.progress.total_steps / 50)
        long = len(streak) >= FEWEST_ROWS and streak[-1][0] - streak[0][0] >= steps
        return streak if long else []


def images_of(row: Row) -> int:
    """The images seen; rows of ssl-pipeline 0.2.0 have "position" in the place of "images"."""
    return _whole(row.get("images", row.get("position")))


def number(value: object) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]


def schedule_of(value: Value) -> Schedule | None:
    """A schedule from settings, where a number means a constant value; None for anything else."""
    try:
        return validate(Schedule, value if isinstance(value, dict) else {"value": value})
    except ConfigError:
        return None


def effective_rate(optim: Value, global_batch: int) -> float | None:
    """The highest learning rate of an `optim` section at this global batch."""
    rate = schedule_of(_below(optim, "lr"))
    if rate is None:
        return None
    reference = number(_below(optim, "lr_reference_batch"))
    ratio = global_batch / reference if reference else 1.0
    return rate.value * (ratio**0.5 if _below(optim, "lr_scaling") == "sqrt" else ratio)


def middle(points: Sequence[Point]) -> float:
    return median(value for _, value in points)


def _below(tree: object, key: str) -> Value:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree  # type: ignore[return-value]


def _whole(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0
