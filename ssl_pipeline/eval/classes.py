"""What a classifier makes of each class, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssl_pipeline.config import printable
from ssl_pipeline.eval.accuracy import ByClass
from ssl_pipeline.eval.measures import format_table, percent
from ssl_pipeline.files import JSON

CLASSES_SHOWN, PAIRS_SHOWN = 20, 5


def print_classes(title: str, found: ByClass, names: Sequence[str]) -> None:
    """Print a row for each class, of many only those recognised worst, and the pairs that are confused most."""
    print("\n" + printable(f"{title}, by class:"))
    print(format_table(("class", "images", "recognised", "precision"), class_rows(found, names)))
    if found.confused:
        print("\nmost confused:")
    for pair in found.confused[:PAIRS_SHOWN]:
        print(printable(f"  {names[pair.label]} taken for {names[pair.taken_for]}: {pair.count}"))


def class_rows(found: ByClass, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Name, images, recall and precision of each class with images; of many only those that are recognised worst."""
    present = [number for number in range(len(names)) if found.images[number] > 0]
    if len(present) > CLASSES_SHOWN:
        present = sorted(present, key=lambda number: found.recall[number].item())[:CLASSES_SHOWN]
    return [
        (
            printable(names[number]),
            str(int(found.images[number])),
            percent(found.recall[number].item()),
            percent(_or_none(found.precision[number])),
        )
        for number in present
    ]


def classes_json(found: ByClass, names: Sequence[str]) -> dict[str, JSON]:
    """The same of all classes for a report, with all pairs."""
    numbers = zip(names, found.images.tolist(), found.recall, found.precision, strict=True)
    return {
        "balanced_accuracy": found.balanced,
        "per_class": [
            {"class": name, "images": images, "top1": _or_none(recall), "precision": _or_none(precision)}
            for name, images, recall, precision in numbers
        ],
        "confused": [
            {"class": names[pair.label], "taken_for": names[pair.taken_for], "images": pair.count}
            for pair in found.confused
        ],
    }


def _or_none(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
