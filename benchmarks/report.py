"""Outcomes as one JSON value and as a table."""

from __future__ import annotations

from statistics import median, quantiles

from benchmarks.rounds import Outcome, Sample
from ssl_pipeline.eval.table import format_table
from ssl_pipeline.files import JSON

Spread = dict[str, float]


def spread(values: list[float]) -> Spread:
    """Median, extremes and the middle half of the values."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "min": min(values), "max": max(values), "q1": low, "q3": high}


def ratios(samples: list[Sample], reference: list[Sample]) -> list[float]:
    """How many times faster than the reference, round by round."""
    return [theirs.seconds_per_item / ours.seconds_per_item for ours, theirs in zip(samples, reference, strict=True)]


def as_json(outcome: Outcome, *, peak_flops: float | None) -> dict[str, JSON]:
    """Everything that was measured in one comparison."""
    comparison = outcome.comparison
    return {
        "name": comparison.name,
        "setting": comparison.setting,
        "item": comparison.item,
        "threads": comparison.threads,
        "contestants": {
            contestant.name: {"note": contestant.note, **_figures(outcome, contestant.name, peak_flops)}
            for contestant in comparison.contestants
            if contestant.name in outcome.samples
        },
        "left_out": dict(comparison.left_out),
        "failed": dict(outcome.failed),
    }


def _figures(outcome: Outcome, name: str, peak_flops: float | None) -> dict[str, JSON]:
    samples = outcome.samples[name]
    per_item = [sample.seconds_per_item for sample in samples]
    figures: dict[str, JSON] = {
        "items_per_second": 1 / median(per_item),
        "seconds_per_item": spread(per_item),
        "cpu_seconds_per_item": median(sample.cpu_seconds / sample.items for sample in samples),
        "rounds": [[sample.items, sample.seconds] for sample in samples],
        "times_as_fast_as": {
            reference: spread(ratios(samples, outcome.samples[reference]))
            for reference in outcome.comparison.references
            if reference in outcome.samples
        },
    }
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    if peaks:
        figures["peak_bytes"] = max(peaks)
    flops = outcome.flops_per_item.get(name)
    if flops:
        figures["flops_per_item"] = flops
        if peak_flops is not None:
            figures["mfu"] = flops / median(per_item) / peak_flops
    return figures


def as_table(report: dict[str, JSON]) -> str:
    """The medians of one comparison's JSON, one row per contestant."""
    contestants = report["contestants"]
    assert isinstance(contestants, dict)
    columns = {name: _row(figures) for name, figures in contestants.items()}
    titles = list(dict.fromkeys(title for row in columns.values() for title in row))
    setting = f" ({report['setting']})" if report["setting"] else ""
    lines = [f"{report['name']}{setting}"]
    if titles:
        rows = [[name, *(row.get(title, "") for title in titles)] for name, row in columns.items()]
        header = [f"{report['item']}", *titles]
        lines.append(format_table(header, rows))
    for title in ("left_out", "failed"):
        named = report[title]
        assert isinstance(named, dict)
        lines += [f"{title.replace('_', ' ')}: {name}: {reason}" for name, reason in named.items()]
    return "\n".join(lines)


def _row(figures: JSON) -> dict[str, str]:
    """Titles and texts of a contestant's columns."""
    assert isinstance(figures, dict)
    per_item, against = figures["seconds_per_item"], figures["times_as_fast_as"]
    assert isinstance(per_item, dict)
    assert isinstance(against, dict)
    row = {
        "per second": f"{figures['items_per_second']:.4g}",
        "each": duration(per_item["median"]),
        "own CPU each": duration(figures["cpu_seconds_per_item"]),
    }
    for reference, values in against.items():
        assert isinstance(values, dict)
        row[f"x {reference}"] = f"{values['median']:.2f} ({values['min']:.2f}-{values['max']:.2f})"
    if "peak_bytes" in figures:
        row["peak MiB"] = f"{figures['peak_bytes'] / 2**20:.0f}"
    if "flops_per_item" in figures:
        row["GFLOP each"] = f"{figures['flops_per_item'] / 1e9:.4g}"
    if "mfu" in figures:
        row["MFU"] = f"{figures['mfu']:.1%}"
    return row


def duration(seconds: float) -> str:
    """`1.23 s`, `4.5 ms` or `678 us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def growth_table(growth: dict[str, JSON]) -> str:
    """Start-up and memory of benchmarks.cost_growth, one row per size of the data set."""
    tables = []
    for title, part in (("start-up", "start_up"), ("memory of a worker", "worker_memory")):
        rows = growth[part]
        assert isinstance(rows, list)
        header = list(rows[0])
        cells = [
            [f"{row[column]:.4g}" if column != header[0] else f"{row[column]:,}" for column in header] for row in rows
        ]
        tables.append(f"cost growth: {title}\n{format_table(header, cells)}")
    return "\n\n".join(tables)
