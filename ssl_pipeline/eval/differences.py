"""What tables say about figures that may differ by chance, and about those that must not be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssl_pipeline.eval.columns import evaluator_of
from ssl_pipeline.eval.intervals import WITHIN, Interval, intervals_overlap
from ssl_pipeline.eval.measures import read_measures
from ssl_pipeline.eval.results import Report

USUAL = {"leave_one_out": False, "interpolation": "bicubic", "precision": "no"}
"""Settings that the columns of a table must share, and that are named where they differ."""


def interval_of(result: Mapping[str, Any]) -> Interval | None:
    """That of the top-1 of one model's part of a report, if it has one."""
    found = result.get("top1_interval")
    return (float(found[0]), float(found[1])) if found else None


def within_interval_of_baselines(title: str, report: Report, label: str, names: Mapping[str, str]) -> list[str]:
    """Top-1 of a report against each baseline whose interval meets the model's: a sentence, or none.

    title: of the column. label: of the model; names: of the baselines.
    """
    own = interval_of(report)
    near = [
        names.get(name, name)
        for name, result in report["baselines"].items()
        if intervals_overlap(own, interval_of(result))
    ]
    return [f"{WITHIN.capitalize()}: {title} of {label} and {' and '.join(near)}."] if near else []


def measures_within_interval(report: Report, names: Mapping[str, str]) -> list[str]:
    """The same for a report of several measures: a sentence for each baseline that some of them do not distinguish."""
    own, lines = read_measures(report), []
    for name, result in report["baselines"].items():
        near = [
            own[key].title
            for key, measure in read_measures(result).items()
            if key in own and intervals_overlap(own[key].interval, measure.interval)
        ]
        if near:
            lines.append(f"{WITHIN.capitalize()} to {names.get(name, name)}: {'; '.join(near)}.")
    return lines


def runs_within_interval(title: str, found: Mapping[str, tuple[float, Interval | None]]) -> list[str]:
    """The runs whose figure is the best one, or differs from it only by chance: a sentence, or none."""
    best = max(found, key=lambda name: found[name][0])
    near = [
        name for name, (_, interval) in found.items() if name != best and intervals_overlap(found[best][1], interval)
    ]
    equal = [name for name in near if found[name][0] == found[best][0]]
    others = [name for name in near if name not in equal]
    first = f"{', '.join([best, *equal])} are equal" if equal else f"{best} is ahead"
    return [f"{title}: {first}{f'; {WITHIN} to ' if others else ''}{', '.join(others)}."] if near else []


def doubts(reports: Mapping[str, Report], titles: Mapping[str, str]) -> list[str]:
    """Why the columns of a table may not be compared, and what each evaluator warned of: one sentence each.

    titles: of the evaluators that have a column.
    """
    protocols = {name: report.get("protocol", {}) for name, report in reports.items()}
    said = dict.fromkeys(str(warning) for protocol in protocols.values() for warning in protocol.get("warnings", ()))
    compared = {name: _of_images(protocols[name]) for name in titles}
    if len(set(compared.values())) > 1:
        each = "; ".join(f"{titles[name]}: {settings}" for name, settings in compared.items())
        said[f"The columns are not of the same images and must not be compared: {each}."] = None
    for name, title in titles.items():
        solver, baselines = reports[name].get("solver"), reports[name]["baselines"]
        if others := [model for model, result in baselines.items() if result.get("solver", solver) != solver]:
            again = f"another classifier was trained. Run eval.{evaluator_of(name)} again."
            said[f"{title} leaves out {', '.join(others)}: {again}"] = None
    return list(said)


def _of_images(protocol: Report) -> str:
    places = f"train={protocol.get('train')} test={protocol.get('test')} size={protocol.get('size')}"
    others = [f"{key}={protocol[key]}" for key, usual in USUAL.items() if protocol.get(key, usual) != usual]
    return " ".join([places, *others])
