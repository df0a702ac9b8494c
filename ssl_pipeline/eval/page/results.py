"""What evaluators have found: a table for each of them, a row for each figure, a column for each network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ssl_pipeline.eval.page.html import Cell, Section, about, folded, heading, paragraph, section, table_of
from ssl_pipeline.eval.page.record import Record, Report
from ssl_pipeline.eval.table import MODELS

NAMES = {"knn": "k-NN", "sgd": "linear probe", "logistic": "logistic regression", "top1": "top-1", "top5": "top-5"}
NAMES |= {"rankme": "RankMe", "rankme_percent": "RankMe, % of the largest possible", "alpha": "alpha-ReQ"}
NAMES |= {"map": "mAP", "miou": "mIoU", "nmi": "NMI", "ari": "ARI", "lidar": "LiDAR"}
PERCENT = ("top1", "top5", "accuracy", "percent", "recall", "precision", "map", "miou")
"""What names of figures in percent end with, or begin with."""
NO_FIGURES = {
    "protocol",
    "baselines",
    "about",
    "chosen",
    "sweep",
    "neighbours",
    "fingerprints",
    "confused",
    "per_class",
}
"""Parts of a report that hold settings, or lists with a place of their own."""
MINOR = ("top5", "validation_top1", "std", "deviation")
"""Ends of figures that are looked at second."""
WITHIN_SUITE = ("knn", "linear")
TOLD = ("train", "test", "num_train", "num_test", "num_classes", "size", "label", "subject", "warnings")
"""Parts of a protocol with a sentence of their own; the others are listed."""
UNTOLD = ("mean", "std", "torch", "timm", "faiss", "scikit-learn", "about", "selection", "interpolation", "dtype")


def results_section(records: Sequence[Record]) -> Section:
    """A table for each evaluator that measured one of the runs, or how to measure."""
    names = list(dict.fromkeys(name for record in records for name in shown_reports(record.reports)))
    if not names:
        return section("Results", paragraph("Nothing was evaluated yet: python -m eval.suite run=DIR train= test="))
    parts = [
        about(
            "Each row is a figure, each column a network. What counts is the distance to the same network at random "
            "initialisation; raw pixels say how hard the images are. In brackets is the 95 % interval: two figures "
            "whose intervals overlap do not differ for sure."
        )
    ]
    for name in names:
        parts += _tables(name, {record.name: record.reports[name] for record in records if name in record.reports})
    return section("Results", *parts)


def shown_reports(reports: Mapping[str, Report]) -> list[str]:
    """Their names, without those whose figures the suite's has too."""
    suite = reports.get("suite")

    def is_within(name: str) -> bool:
        return (
            suite is not None
            and name in WITHIN_SUITE
            and reports[name]["protocol"].get("subject") == suite["protocol"].get("subject")
        )

    return [name for name in reports if not is_within(name)]


def _tables(name: str, reports: Mapping[str, Report]) -> list[str]:
    """The table of one evaluator over the runs that it measured; the baselines are those of the first."""
    first = next(iter(reports.values()))
    baselines = {MODELS.get(key, key): report for key, report in reversed(first.get("baselines", {}).items())}
    columns = {**reports, **baselines}
    found = {title: dict(figures(report)) for title, report in columns.items()}
    intervals = {title: dict(intervals_of(report)) for title, report in columns.items()}
    major: list[list[str | Cell]] = []
    minor: list[list[str | Cell]] = []
    for key in dict.fromkeys(key for one in found.values() for key in one):
        cells = [_cell(key, found[title].get(key), intervals[title].get(key)) for title in columns]
        (minor if key.endswith(MINOR) else major).append([title_of(key), *cells])
    header, (subject, *told) = ["", *columns], told_protocol(first["protocol"]) or ["-"]
    parts = [heading(_words(name)), paragraph(subject), *_doubts(reports)]
    parts.append(table_of(header, major or minor))
    if major and minor:
        parts.append(folded("More figures", table_of(header, minor)))
    return [*parts, folded("Protocol", *map(paragraph, told))] if told else parts


def _doubts(reports: Mapping[str, Report]) -> list[str]:
    """What the evaluator warned of, and runs that were measured otherwise than the first."""
    parts, (first, *others) = [], reports.items()
    for title, report in others:
        differing = _differing(first[1]["protocol"], report["protocol"])
        if differing:
            text = f"{title} was measured otherwise ({differing}): its figures are not to be compared with the others."
            parts.append(paragraph(text, kind="warning"))
    for title, report in reports.items():
        of_run = f"{title}: " if others else ""
        warnings = report["protocol"].get("warnings", ())
        parts += [paragraph(f"Warning: {of_run}{text}", kind="warning") for text in warnings]
    return parts


def figures(report: Report, above: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """Every number of a report by its path, what stands in its lists and its settings aside."""
    for key, value in report.items():
        if key in NO_FIGURES or key.endswith(("_interval", "_interval_by_k")):
            continue
        path = (*above, key)
        if isinstance(value, Mapping):
            yield from figures(value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool) and not _is_repeated(report, path):
            yield ".".join(path), float(value)


def _is_repeated(report: Report, path: tuple[str, ...]) -> bool:
    """Whether a headline stands once more below: top1 beside by_k, or that of the suite's own first classifier."""
    return path[-1] in ("top1", "top5") and ("by_k" in report or (len(path) == 1 and "by_class" in report))


def intervals_of(report: Report, above: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[float, float]]]:
    """The interval of each figure that has one, by the path of the figure."""
    for key, value in report.items():
        if key in NO_FIGURES:
            continue
        if key.endswith("_interval_by_k"):
            for k, interval in value.items():
                yield ".".join((*above, "by_k", k, key.removesuffix("_interval_by_k"))), tuple(interval)
        elif key.endswith("_interval") and value:
            yield ".".join((*above, key.removesuffix("_interval"))), tuple(value)
        elif isinstance(value, Mapping):
            yield from intervals_of(value, (*above, key))


def title_of(path: str) -> str:
    """`knn.by_k.20.top1` -> `k-NN, k=20, top-1`."""
    words: list[str] = []
    parts = path.split(".")
    while parts:
        part = parts.pop(0)
        if part == "by_class":
            continue
        if part.startswith("by_") and parts:
            value = parts.pop(0)
            if part == "by_temperature" and parts:  # its numbers have a point of their own
                value = ".".join([value, *(parts.pop(0) for _ in parts[:1] if parts[0].isdecimal())])
            words.append(f"{part.removeprefix('by_').replace('_', ' ')}={value}")
        else:
            words.append(_words(part))
    return ", ".join(words)


def _words(name: str) -> str:
    """A name as people write it; of a report with what `which` and `step` picked."""
    first, *picked = name.split("-")
    return ", ".join([NAMES.get(first, first.replace("_", " ")), *([" ".join(picked)] if picked else [])])


def is_percent(path: str) -> bool:
    last = path.rpartition(".")[2]
    return last.endswith(PERCENT) or last.startswith(PERCENT)


def _cell(path: str, value: float | None, interval: tuple[float, float] | None) -> str | Cell:
    if value is None:
        return "-"
    if not is_percent(path):
        return Cell(f"{value:.4g}")
    small = f"({interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
    return Cell(f"{value:.2f} %", small, value / 100)


def told_protocol(protocol: Report) -> list[str]:
    """How it was measured, in sentences: on which images, then with which weights and settings."""
    subject, told = protocol.get("subject") or {}, []
    if "train" in protocol:
        test = protocol.get("test", protocol["train"])
        counts = [f" ({protocol[key]:,} images)" if key in protocol else "" for key in ("num_train", "num_test")]
        classes = f", {protocol['num_classes']} classes" if "num_classes" in protocol else ""
        size = f", {protocol['size']} pixels" if "size" in protocol else ""
        told.append(f"Measured on {protocol['train']}{counts[0]} and {test}{counts[1]}{classes}{size}.")
    if subject:
        sha256 = subject.get("weights_sha256")
        of_file = f"; SHA-256 {str(sha256)[:16]}" if sha256 else ""
        told.append(f"{protocol.get('label', 'the backbone')}: {subject.get('weights', 'no weights')}{of_file}.")
    rest = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in _plain(protocol))
    return [*told, f"Settings: {rest}."] if rest else told


def _plain(protocol: Report, above: str = "") -> Iterator[tuple[str, object]]:
    """The settings of a protocol that have no sentence; of the suite those of each evaluator."""
    for key, value in protocol.items():
        if key in TOLD or key in UNTOLD or value is None:
            continue
        if isinstance(value, Mapping):
            yield from _plain(value, f"{above}{NAMES.get(key, key)} ")
        else:
            yield above + key, value


def _short(value: object) -> str:
    return (
        ", ".join(map(_short, value))
        if isinstance(value, list | tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _differing(first: Report, other: Report) -> str:
    """The settings by which two figures are no longer of the same measure."""
    keys = [key for key in (*first, *other) if key not in ("label", "subject", "warnings", "mean", "std")]
    return ", ".join(dict.fromkeys(key for key in keys if first.get(key) != other.get(key)))
