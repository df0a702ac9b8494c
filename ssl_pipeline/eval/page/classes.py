"""Classes that are recognised worst, and those that are confused, from the suite's report."""

from __future__ import annotations

from ssl_pipeline.eval.page.html import Cell, Section, about, heading, paragraph, section, table_of
from ssl_pipeline.eval.page.results import NAMES
from ssl_pipeline.eval.results import Report

MOST_CLASSES = 100


def classes_section(suite: Report) -> Section:
    """Each class, worst first, and what is confused most, for the first linear classifier."""
    by_class = suite["by_class"]
    name = next(classifier for classifier in by_class if classifier != "knn" or len(by_class) == 1)
    rows = [row for row in by_class[name]["per_class"] if row["images"]]
    rows.sort(key=lambda row: row["top1"])
    shown = [
        [row["class"], str(row["images"]), _percent(row["top1"]), _percent(row["precision"])]
        for row in rows[:MOST_CLASSES]
    ]
    parts = [
        about(
            "The worst recognised classes come first. Recognised is the share of a class's own images; precision is "
            "the share of the images assigned to it that belong to it."
        ),
        table_of(["class", "images", "recognised", "precision"], shown),
    ]
    if len(rows) > MOST_CLASSES:
        parts.insert(1, paragraph(f"The {MOST_CLASSES} worst of {len(rows)} classes."))
    return section(f"By class ({NAMES.get(name, name)})", *parts, *_confused(by_class[name]["confused"]))


def _confused(pairs: list[Report]) -> list[str]:
    if not pairs:
        return [paragraph("No image is assigned to another class.")]
    most = max(pair["images"] for pair in pairs)
    rows: list[list[str | Cell]] = [
        [f"{pair['class']} taken for {pair['taken_for']}", Cell(str(pair["images"]), share=pair["images"] / most)]
        for pair in pairs
    ]
    return [
        heading("Most confused"),
        about("How many images of a class were assigned to another. Pairs that people confuse too are not a fault."),
        table_of(["", "images"], rows),
    ]


def _percent(value: float | None) -> str | Cell:
    return "-" if value is None else Cell(f"{value:.2f} %", share=value / 100)
