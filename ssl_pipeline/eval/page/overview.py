"""What is seen first: the conclusion in one sentence, the few figures that matter, and what the doctor found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ssl_pipeline.eval.columns import WITHIN_SUITE
from ssl_pipeline.eval.intervals import WITHIN, Interval, intervals_overlap
from ssl_pipeline.eval.measures import read_measures
from ssl_pipeline.eval.one_figure import in_list, protocol_of_figure
from ssl_pipeline.eval.page.curves import number
from ssl_pipeline.eval.page.html import Section, Tile, about, finding, section
from ssl_pipeline.eval.page.metrics import MONITORED, Series
from ssl_pipeline.eval.page.record import Record
from ssl_pipeline.eval.results import CLASSIFIERS, Report, classifier_of, differing
from ssl_pipeline.files import JSON

ON_FEATURES = ("knn", "sgd", "logistic")
AGAINST = {"random": "at random initialisation", "raw_pixels": "with raw pixels"}

Votes = tuple[int, float]  # k and temperature of k-NN


@dataclass(frozen=True)
class Accuracy:
    """A top-1 in percent, with its interval if that is known."""

    top1: float
    interval: Interval | None


@dataclass(frozen=True)
class Headline:
    """What says most about a run: its accuracy by a classifier, those of the baselines, and of which images."""

    classifier: str
    own: Accuracy
    baselines: Mapping[str, Accuracy]
    images: str
    protocol: Mapping[str, JSON]
    by_votes: Mapping[Votes, Accuracy]
    """Of k-NN the accuracy for each k and temperature."""


def conclusion(records: Sequence[Record]) -> str:
    """One sentence: what evaluators found and against what, or the first monitor, or the loss; and what is wrong."""
    told = _compared(records) if len(records) > 1 else _found(records[0])
    wrong = sum(len(record.findings) for record in records)
    if wrong:
        told += f", and the doctor has {_count(wrong, 'remark')}"
    return f"{told if len(records) > 1 else told[:1].upper() + told[1:]}."


def _found(record: Record) -> str:
    best = headline(record)
    if best is not None:
        told = f"{best.classifier} recognises {best.own.top1:.1f} % of {best.images}"
        if best.own.interval:
            told += f" ({best.own.interval[0]:.1f} to {best.own.interval[1]:.1f})"
        against = [
            f"{found.top1:.1f} % {AGAINST[name]}"
            + (f" ({WITHIN})" if intervals_overlap(best.own.interval, found.interval) else "")
            for name, found in ((name, best.baselines[name]) for name in AGAINST if name in best.baselines)
        ]
        return f"{told}, against {' and '.join(against)}" if against else told
    return _monitored(record)


def _monitored(record: Record) -> str:
    """The course of the first monitor that measured, or of the loss, which one row says nothing of."""
    by_name = {one.name: one for one in record.series if one.name != "loss" or len(one.steps) > 1}
    one = next((by_name[name] for name in (*MONITORED, "loss") if name in by_name), None)
    return "nothing was measured yet" if one is None else _course(one)


def _course(one: Series) -> str:
    first = "at the start" if one.start is not None else f"at step {one.steps[0]:,}"
    if len(one.steps) == 1:
        return f"{one.title} was {number(one.values[0])} {first}"
    return (
        f"{one.title} went from {number(one.values[0])} {first} to {number(one.values[-1])} at step {one.steps[-1]:,}"
    )


def _compared(records: Sequence[Record]) -> str:
    """Which run is ahead by the measure that all of them have, and whether by more than chance."""
    found = {record.name: headline(record) for record in records}
    measured, at = _with_the_same_votes({name: best for name, best in found.items() if best is not None})
    otherwise = differing({name: best.protocol for name, best in measured.items()})
    if len(measured) == len(records) and otherwise:
        return "; ".join(f"{record.name}: {_found(record)}" for record in records) + "; measured differently"
    if len(measured) == len(records) and len({best.classifier for best in measured.values()}) == 1:
        order = sorted(measured, key=lambda name: measured[name].own.top1, reverse=True)
        first, second = (measured[name].own for name in order[:2])
        if first.top1 == second.top1:
            equal = f"{order[0]} and {order[1]} are equal in {measured[order[0]].classifier} top-1{at}"
            return f"{equal} with {first.top1:.1f} %"
        told = f"{order[0]} is ahead in {measured[order[0]].classifier} top-1{at} with {first.top1:.1f} %, before "
        told += f"{order[1]} with {second.top1:.1f} %"
        return f"{told} ({WITHIN})" if intervals_overlap(first.interval, second.interval) else told
    return "; ".join(f"{record.name}: {words}" for record, words in zip(records, _side_by_side(records), strict=True))


def _side_by_side(records: Sequence[Record]) -> list[str]:
    """The monitor that all runs have; without one what is known of each, but no losses of different methods."""
    series = [{one.name: one for one in record.series} for record in records]
    shared = next((name for name in MONITORED if all(name in of_run for of_run in series)), None)
    if shared is not None:
        return [_course(of_run[shared]) for of_run in series]
    one_method = len({record.setting("method", "name") for record in records}) == 1
    return [
        _found(record)
        if one_method or headline(record) is not None or not MONITORED.keys().isdisjoint(of_run)
        else "nothing that compares with another method was measured"
        for record, of_run in zip(records, series, strict=True)
    ]


def _with_the_same_votes(measured: Mapping[str, Headline]) -> tuple[Mapping[str, Headline], str]:
    """The same by the first k and temperature that all have, where those of the headlines differ, and the words for it.

    As they are where the headlines agree, and where there is no such k.
    """
    votes = {(str(best.protocol.get("k")), str(best.protocol.get("temperature"))) for best in measured.values()}
    if len(votes) < 2:
        return measured, ""
    first, *others = (best.by_votes for best in measured.values())
    common = next((one for one in first if all(one in other for other in others)), None)
    if common is None:
        return measured, ""
    k, temperature = common
    shared = {
        name: replace(best, own=best.by_votes[common], protocol={**best.protocol, "k": [k], "temperature": temperature})
        for name, best in measured.items()
    }
    return shared, f", k={k}, temperature {temperature:g}," if len({t for _, t in votes}) > 1 else f", k={k},"


def headline(record: Record) -> Headline | None:
    """That of the first report of a classifier on features; None without one."""
    for name, report in record.reports.items():
        for key in ON_FEATURES:
            own = _accuracy(report, name, key)
            if own is not None:
                baselines = {
                    model: found
                    for model, result in report.get("baselines", {}).items()
                    if (found := _accuracy(result, name, key)) is not None
                }
                images = "the images, each by all others" if _leaves_one_out(report) else "the test images"
                protocol = _protocol_of(report, name, key)
                by_votes = _by_votes(report[key] if name == "suite" else report, protocol) if key == "knn" else {}
                own_protocol = protocol_of_figure("knn", protocol) if key == "knn" else protocol
                return Headline(CLASSIFIERS[key], own, baselines, images, own_protocol, by_votes)
    return None


def _protocol_of(report: Report, name: str, key: str) -> dict[str, JSON]:
    """That of a classifier, as its evaluator would report it."""
    protocol: Report = report["protocol"]
    if name != "suite":
        return dict(protocol)
    shared = {part: value for part, value in protocol.items() if part not in WITHIN_SUITE}
    return {
        **shared,
        **protocol.get("knn" if key == "knn" else "linear", {}),
        **({} if key == "knn" else {"solver": key}),
    }


def _by_votes(report: Report, protocol: Mapping[str, JSON]) -> dict[Votes, Accuracy]:
    """Of k-NN's report; of an older one, which does not say, none."""
    found: dict[Votes, Accuracy] = {}
    for name, measure in read_measures(report).items():
        if name.startswith("top1_k"):
            own = protocol_of_figure("knn", protocol, name)
            k, temperature = in_list(own.get("k"))[0], own.get("temperature")
            if isinstance(k, int) and isinstance(temperature, int | float):
                found[k, float(temperature)] = Accuracy(measure.value, measure.interval)
    return found


def _leaves_one_out(report: Report) -> bool:
    return bool(report.get("protocol", {}).get("leave_one_out"))


def _accuracy(result: Report, name: str, key: str) -> Accuracy | None:
    """That of a classifier in the suite's report, or in its own; None where the report is about another."""
    if name == "suite":
        part: Report = result.get(key) or {}
    else:
        part = result if classifier_of(name.partition("-")[0], result) == key else {}
    top1, interval = part.get("top1"), part.get("top1_interval")
    if not isinstance(top1, int | float):
        return None
    return Accuracy(float(top1), (interval[0], interval[1]) if interval else None)


def tiles(record: Record) -> list[Tile]:
    """The figures of a run that are looked for first."""
    series = {one.name: one for one in record.series}
    found: list[Tile] = []
    for name, report in record.reports.items():
        for key in ON_FEATURES:
            own, title = _accuracy(report, name, key), f"{CLASSIFIERS[key]} top-1"
            random = _accuracy(report.get("baselines", {}).get("random", {}), name, key)
            if own is not None and not any(tile.title == title for tile in found):
                found.append(Tile(title, f"{own.top1:.1f} %", f"{random.top1:.1f} % at random" if random else ""))
    measured = {tile.title for tile in found}
    for name in ("knn_top1", "classifier_top1", "rankme_percent", "loss"):
        if name in series and not (name == "knn_top1" and "k-NN top-1" in measured):
            found.append(_last(series[name]))
    reached = [one.steps[-1] for one in record.series] + ([record.status.step] if record.status else [])
    found.append(Tile("steps", f"{max(reached, default=0):,}", _epochs(record)))
    if "images_per_second" in series:
        speeds = sorted(series["images_per_second"].values)
        found.append(Tile("images per second", f"{speeds[len(speeds) // 2]:,.0f}", "median"))
    found.append(Tile("doctor", _count(len(record.findings), "remark") if record.findings else "no remarks", ""))
    return found


def _last(one: Series) -> Tile:
    unit = " %" if "%" in one.title else ""
    first = f"{number(one.values[0])}{unit} {'at the start' if one.start is not None else 'at first'}"
    return Tile(
        one.title.replace(" (%)", "").replace(" (% of the largest possible)", ""), number(one.values[-1]) + unit, first
    )


def _epochs(record: Record) -> str:
    epochs, method = record.setting("train", "epochs"), record.setting("method", "name")
    of = f" of {epochs:g} epochs" if isinstance(epochs, int | float) else ""
    return f"{method}{of}" if method else ""


def findings_section(records: Sequence[Record]) -> Section:
    """What the doctor says of each run."""
    parts = []
    for record in records:
        of_run = f"{record.name}, step" if len(records) > 1 else "Step"
        if record.status is not None and record.status.reason:
            parts.append(
                finding(f"{record.name} {record.status.state} at step {record.status.step:,}", record.status.reason, "")
            )
        parts += [
            finding(
                f"{of_run} {found.step:,}: {found.rule.replace('_', ' ')}",
                f"{found.seen[:1].upper()}{found.seen[1:]} {found.helps}",
                ", ".join(found.settings),
            )
            for found in record.findings
        ]
        if not record.findings and record.series:
            words = "No common problem was found in the logged metrics and settings."
            parts.append(finding(f"{record.name}: no rule of the doctor found anything", words, "", kind="well"))
    words = "Rules over the logged metrics: what was seen, from which step on, what usually helps, the settings for it."
    return section("Doctor", about(words), *parts)


def _count(number_of: int, what: str) -> str:
    return f"{number_of} {what}{'' if number_of == 1 else 's'}"
