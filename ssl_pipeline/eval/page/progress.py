"""How training went: a curve for each metric, all runs in it, and the figures of the monitors."""

from __future__ import annotations

from collections.abc import Sequence

from ssl_pipeline.eval.page.curves import curve, number
from ssl_pipeline.eval.page.html import Section, about, curves, folded, legend, section, table_of
from ssl_pipeline.eval.page.metrics import MONITORED, READING, Series, place_of, title_of
from ssl_pipeline.eval.page.record import Record

MOST_LAYERS = 40  # in one figure


def curves_section(records: Sequence[Record]) -> list[Section]:
    """A curve for each metric that one of the runs logged twice or more; none if none did."""
    drawn, told = [], []
    logged = {series.name for record in records for series in record.series if len(series.values) > 1}
    layers = {name for name in logged if "/" in name}
    for name in sorted(logged - layers, key=place_of):
        lines = _lines(records, name, planned=False)
        drawn.append((lines[0][2].title, _last(lines), curve(lines)))
        if name in READING:
            told.append([lines[0][2].title, READING[name]])
    planned = dict.fromkeys(series.name for record in records for series in record.planned)
    for name in planned:
        lines = _lines(records, name, planned=True)
        drawn.append((f"{lines[0][2].title} (planned)", _last(lines), curve(lines)))
    for prefix in sorted({name.partition("/")[0] for name in layers}):
        lines = _layers(records[0], prefix)
        if lines:
            drawn.append((f"{title_of(prefix)} of {len(lines)} layers", "", curve(lines)))
    if not drawn:
        return []
    words = (
        "Each curve over the optimizer steps, with its last figure; the dashed line is what was measured before the "
        "first step. Curves that are planned follow from the settings."
    )
    names = [record.name for record in records]
    parts = [about(words), legend(names) if len(names) > 1 else "", curves(drawn)]
    if told:
        parts.append(folded("How to read them", table_of(["", ""], told, kind="facts")))
    return [section("Curves", *parts)]


def _lines(records: Sequence[Record], name: str, *, planned: bool) -> list[tuple[int, str, Series]]:
    return [
        (place, record.name, series)
        for place, record in enumerate(records)
        for series in (record.planned if planned else record.series)
        if series.name == name and (planned or len(series.values) > 1)
    ]


def _layers(record: Record, prefix: str) -> list[tuple[int, str, Series]]:
    """The series of a run's layers, evenly spread if there are many, named by the layer where the pointer is."""
    found = [series for series in record.series if series.name.startswith(f"{prefix}/") and len(series.values) > 1]
    count = min(len(found), MOST_LAYERS)
    chosen = [found[place * len(found) // count] for place in range(count)]
    return [(place, series.name.partition("/")[2], series) for place, series in enumerate(chosen)]


def _last(lines: Sequence[tuple[int, str, Series]]) -> str:
    return ", ".join(number(series.values[-1]) for _, _, series in lines)


def monitors_section(records: Sequence[Record]) -> list[Section]:
    """Start, best and last figure of each monitor; none without monitors."""
    rows = []
    for record in records:
        for one in record.series:
            if one.name in MONITORED:
                best = one.best()
                rows.append(
                    [
                        f"{record.name}: {one.title}" if len(records) > 1 else one.title,
                        "-" if one.start is None else number(one.start),
                        "-" if best is None else f"{number(best[0])} (step {best[1]:,})",
                        f"{number(one.values[-1])} (step {one.steps[-1]:,})",
                    ]
                )
    words = "Measured during training, on the backbone that the run exports. Do not choose settings by test images."
    return [section("Monitors", about(words), table_of(["", "at the start", "best", "last"], rows))] if rows else []
