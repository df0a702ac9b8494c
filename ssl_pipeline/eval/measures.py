"""The figures that an evaluator reports, in the shape that every table, file and page of evaluations reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssl_pipeline.eval.intervals import share_interval
from ssl_pipeline.files import JSON


@dataclass(frozen=True)
class Measure:
    """One figure of one model.

    name: its key, such as `top1_5_per_class`, of the report and of results.csv. title: what tables call it.
    interval: of 95 % over the test images (`eval/intervals.py`). spread: standard deviation over draws.
    """

    name: str
    title: str
    value: float
    unit: str = "%"
    interval: tuple[float, float] | None = None
    spread: float | None = None

    def cell(self) -> str:
        """`76.94 % (74.2 to 79.6)`, with `+- 1.20` where there is a spread."""
        text = f"{self.value:.2f} %" if self.unit == "%" else f"{self.value:.4g}"
        if self.spread is not None:
            text += f" +- {self.spread:.2f}"
        if self.interval is not None:
            low, high = (f"{limit:.1f}" if self.unit == "%" else f"{limit:.4g}" for limit in self.interval)
            text += f" ({low} to {high})"
        return text


@dataclass(frozen=True)
class Found:
    """What an evaluator found of one model: its figures, the headline first, and what else its report holds."""

    measures: tuple[Measure, ...]
    details: Mapping[str, JSON]

    def to_json(self) -> dict[str, JSON]:
        return {"measures": measures_json(self.measures), **self.details}


def measures_json(measures: Sequence[Measure]) -> list[JSON]:
    """As they stand in a report."""
    return [asdict(measure) for measure in measures]


def measures_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measures of one model's part of a report; of a report without a list of them its top-1 and top-5."""
    return result.get("measures") or [
        {
            "name": name,
            "title": title,
            "value": result[name],
            "unit": "%",
            "interval": result.get(f"{name}_interval"),
            "spread": None,
        }
        for name, title in (("top1", "top-1"), ("top5", "top-5"))
        if name in result
    ]


def read_measures(result: Mapping[str, Any]) -> dict[str, Measure]:
    """Those of one model's part of a report, by name."""
    listed: list[Any] = measures_of(result)
    return {measure["name"]: Measure(**measure) for measure in listed}


def measures_table(title: str, models: Sequence[tuple[str, Found]]) -> str:
    """A row for each measure, a column for each model."""
    names = list(dict.fromkeys(measure.name for _, found in models for measure in found.measures))
    by_model = [{measure.name: measure for measure in found.measures} for _, found in models]
    rows = []
    for name in names:
        own = [measures.get(name) for measures in by_model]
        called = next(measure.title for measure in own if measure is not None)
        rows.append([called, *("-" if measure is None else measure.cell() for measure in own)])
    return format_table([title, *(label for label, _ in models)], rows)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text with the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f} %"


def with_interval(value: float, num_images: int) -> str:
    """`76.94 % (74.2 to 79.6)`: a share of a number of images with its 95 % interval."""
    low, high = share_interval(value, num_images)
    return f"{percent(value)} ({low:.1f} to {high:.1f})"
