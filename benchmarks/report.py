"""Outcomes as one JSON value, with every single round, and as a table of medians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median

from benchmarks.rounds import Outcome, Sample
from ssl_pipeline.eval.measures import format_table
from ssl_pipeline.files import JSON


def as_json(outcome: Outcome) -> dict[str, JSON]:
    """Everything that was measured in one comparison."""
    comparison = outcome.comparison
    contestants: dict[str, JSON] = {}
    for contestant in comparison.contestants:
        if contestant.name in outcome.samples:
            rounds = [asdict(sample) for sample in outcome.samples[contestant.name]]
            flops = outcome.flops_per_item.get(contestant.name)
            contestants[contestant.name] = {"note": contestant.note, "rounds": rounds, "flops_per_item": flops}
    return {
        "name": comparison.name,
        "setting": comparison.setting,
        "item": comparison.item,
        "threads": comparison.threads,
        "references": comparison.references,
        "contestants": contestants,
        "left_out": comparison.left_out,
        "failed": outcome.failed,
    }


def as_table(outcome: Outcome, *, peak_flops: float | None = None) -> str:
    """The medians of one comparison, one row per contestant."""
    comparison = outcome.comparison
    lines = [f"{comparison.name} ({comparison.setting})" if comparison.setting else comparison.name]
    if outcome.samples:
        rows = {name: _row(outcome, name, peak_flops) for name in outcome.samples}
        lines.append(table_of(comparison.item, rows))
    for title, named in (("left out", comparison.left_out), ("failed", outcome.failed)):
        lines += [f"{title}: {name}: {reason}" for name, reason in named.items()]
    return "\n".join(lines)


def _row(outcome: Outcome, name: str, peak_flops: float | None) -> dict[str, str]:
    """Titles and texts of a contestant's columns."""
    samples, flops = outcome.samples[name], outcome.flops_per_item.get(name)
    each = median(sample.seconds_per_item for sample in samples)
    row = {
        "per second": f"{1 / each:.4g}",
        "each": duration(each),
        "own CPU each": duration(median(sample.cpu_seconds / sample.items for sample in samples)),
    }
    for reference in outcome.comparison.references:
        if reference in outcome.samples:
            times = ratios(samples, outcome.samples[reference])
            row[f"x {reference}"] = f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    if peaks:
        row["peak MiB"] = f"{max(peaks) / 2**20:.0f}"
    if flops:
        row["GFLOP each"] = f"{flops / 1e9:.4g}"
        if peak_flops:
            row["MFU"] = f"{flops / each / peak_flops:.1%}"
    return row


def ratios(samples: list[Sample], reference: list[Sample]) -> list[float]:
    """How many times faster than the reference, round by round."""
    return [theirs.seconds_per_item / ours.seconds_per_item for ours, theirs in zip(samples, reference, strict=True)]


def table_of(item: str, rows: Mapping[str, Mapping[str, str]]) -> str:
    """Rows by their name, which stands under `item`; a row may lack columns that others have."""
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    cells = [[name, *(row.get(title, "") for title in titles)] for name, row in rows.items()]
    return format_table([item, *titles], cells)


def duration(seconds: float) -> str:
    """`1.23 s`, `4.5 ms` or `678 us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
