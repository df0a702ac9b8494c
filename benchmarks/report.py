"""What was measured as one JSON value, with every single round, and as a table of medians."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from benchmarks.rounds import Comparison, Sample
from ssl_pipeline.eval.measures import format_table
from ssl_pipeline.files import JSON

Row = dict[str, JSON]


def as_json(comparison: Comparison) -> Row:
    """Everything that was measured in one comparison."""
    contestants: Row = {}
    for contestant in comparison.contestants:
        if contestant.name in comparison.samples:
            rounds = [asdict(sample) for sample in comparison.samples[contestant.name]]
            flops = comparison.flops_per_item.get(contestant.name)
            contestants[contestant.name] = {"note": contestant.note, "rounds": rounds, "flops_per_item": flops}
    plain = ("name", "setting", "item", "threads", "references", "left_out", "failed")
    return {**{name: getattr(comparison, name) for name in plain}, "contestants": contestants}


def as_table(comparison: Comparison, *, peak_flops: float | None = None) -> str:
    """The medians of one comparison, one row per contestant."""
    lines = [f"{comparison.name} ({comparison.setting})" if comparison.setting else comparison.name]
    if comparison.samples:
        rows = {name: _row(comparison, name, peak_flops) for name in comparison.samples}
        titles = list(dict.fromkeys(title for row in rows.values() for title in row))  # a row may lack some
        cells = [[name, *(row.get(title, "") for title in titles)] for name, row in rows.items()]
        lines.append(format_table([comparison.item, *titles], cells))
    for title, named in (("left out", comparison.left_out), ("failed", comparison.failed)):
        lines += [f"{title}: {name}: {reason}" for name, reason in named.items()]
    return "\n".join(lines)


def _row(comparison: Comparison, name: str, peak_flops: float | None) -> dict[str, str]:
    """Titles and texts of a contestant's columns."""
    samples, flops = comparison.samples[name], comparison.flops_per_item.get(name)
    each = median(sample.seconds_per_item for sample in samples)
    row = {
        "per second": f"{1 / each:.4g}",
        "each": duration(each),
        "own CPU each": duration(median(sample.cpu_seconds / sample.items for sample in samples)),
    }
    for reference in comparison.references:
        if reference in comparison.samples:
            times = ratios(samples, comparison.samples[reference])
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


def table_of(title: str, rows: Sequence[Row], *, numbered: bool = False) -> str:
    """Figures with the same keys, the first of which names its row; with its place where several have one name."""

    def text(value: JSON) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in row.values()] for row in rows]
    if numbered:
        cells = [[f"{name} #{place}", *others] for place, (name, *others) in enumerate(cells)]
    return f"{title}\n{format_table(list(rows[0]), cells)}"


def duration(seconds: float) -> str:
    """`1.23 s`, `4.5 ms` or `678 us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
