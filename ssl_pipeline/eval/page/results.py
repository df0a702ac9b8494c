"""The results of evaluators: a table for each of them, a row for each figure, a column for each network."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ssl_pipeline.eval.columns import WITHIN_SUITE
from ssl_pipeline.eval.intervals import METHOD
from ssl_pipeline.eval.labelled_sets import UNKNOWN, labelled_sets
from ssl_pipeline.eval.measures import Measure, read_measures
from ssl_pipeline.eval.one_figure import USUAL_TEMPERATURE, figure_name, in_list, protocol_of_figure
from ssl_pipeline.eval.page.html import Cell, Section, about, folded, heading, paragraph, section, table_of
from ssl_pipeline.eval.page.places import shortened
from ssl_pipeline.eval.page.record import Record
from ssl_pipeline.eval.results import CLASSIFIERS, Report, classifier_of, comparable, differing, own_sizes
from ssl_pipeline.eval.table import MODELS
from ssl_pipeline.files import JSON

PARTS_OF_SUITE = ("knn", "logistic", "sgd")
NAMES = {**CLASSIFIERS, "suite": "classifiers and spectrum"}
VOTED_BY = ("k", "temperature")
MINOR = ("top5", "validation")
"""How the names of secondary figures begin."""
TOLD = {"images", "train", "test", "num_images", "num_train", "num_test", "num_classes", "size", "label", "subject"}
"""Parts of a protocol with a sentence of their own; the others are listed."""
UNTOLD = {"warnings", "mean", "std", "torch", "timm", "faiss", "scikit-learn", "about", "selection", "dtype"}
UNTOLD |= {"interpolation", "own_size", "images_fingerprint", "train_fingerprint", "test_fingerprint"}


def results_section(records: Sequence[Record]) -> Section:
    """A table for each evaluator that measured one of the runs, or how to measure."""
    names = list(dict.fromkeys(name for record in records for name in shown_reports(record.reports)))
    if not names:
        return section("Results", paragraph(_how_to_measure(records[0].path)))
    parts = [
        about(
            "Each row is a figure, each column a network. What counts is the distance to the same network at random "
            f"initialisation; raw pixels say how hard the images are. In brackets is the 95 % interval ({METHOD}): two "
            "figures whose intervals overlap may not differ."
        )
    ]
    for name in names:
        parts += _tables(name, {record.name: record.reports[name] for record in records if name in record.reports})
    return section("Results", *parts)


def _how_to_measure(run: Path) -> str:
    """The command that measures a run, with places that the page shows as they are; DIR for one that it shortens."""
    sets = labelled_sets(run)
    one = sets is not None and sets.train == sets.test  # the suite leaves no image out
    images = UNKNOWN if sets is None or shortened(str(sets)) != str(sets) else str(sets)
    images += " leave_one_out=true" if one and images == UNKNOWN else ""
    place = shlex.quote(str(run))
    command = f"python -m eval.{'knn' if one else 'suite'}"
    called, where = (place, "") if shortened(place) == place else ("DIR", ", where DIR is the run's directory")
    return f"Nothing was evaluated yet: {command} run={called} {images}{where}"


def shown_reports(reports: Mapping[str, Report]) -> list[str]:
    """Their names, without those whose figures the suite's has too."""
    suite = reports.get("suite")

    def is_within(name: str) -> bool:
        if suite is None or name not in WITHIN_SUITE:
            return False
        own, of_suite = reports[name]["protocol"], suite["protocol"]
        shared = {key: value for key, value in of_suite.items() if key not in WITHIN_SUITE}
        same = comparable({**of_suite.get(name, {}), **shared}) == comparable(own)
        return same and own.get("subject") == of_suite.get("subject")

    return [name for name in reports if not is_within(name)]


def _tables(name: str, reports: Mapping[str, Report]) -> list[str]:
    """The table of one evaluator over the runs that it measured; the baselines are those of the first."""
    (of_run, first), several = next(iter(reports.items())), len(reports) > 1
    whose = f" of {of_run}" if several else ""
    baselines = {
        f"{MODELS.get(key, key)}{whose}": report for key, report in reversed(first.get("baselines", {}).items())
    }
    found = {title: figures(name, report, report["protocol"]) for title, report in reports.items()}
    found |= {title: figures(name, report, first["protocol"]) for title, report in baselines.items()}
    major: list[list[str | Cell]] = []
    minor: list[list[str | Cell]] = []
    for key in dict.fromkeys(key for measures in found.values() for key in measures):
        of_models = [measures.get(key) for measures in found.values()]
        title = next(measure.title for measure in of_models if measure is not None)
        part, _, of_part = key.partition(".")
        own = of_part if part in PARTS_OF_SUITE else key
        (minor if own.startswith(MINOR) else major).append([title, *map(_cell, of_models)])
    header, (subject, *told) = ["", *found], told_protocol(first["protocol"]) or ["-"]
    parts = [heading(_words(name, first)), paragraph(subject), *_doubts(name, reports)]
    parts.append(table_of(header, major or minor))
    if major and minor:
        parts.append(folded("More figures", table_of(header, minor)))
    return [*parts, folded("Protocol", *map(paragraph, told))] if told else parts


def _doubts(name: str, reports: Mapping[str, Report]) -> list[str]:
    """What the evaluator warned of, and runs that were measured differently from the first."""
    parts, (first, *others) = [], reports.items()
    for title, report in others:
        both = dict([first, (title, report)])
        for otherwise, rows in _measured_otherwise(name, both).items():
            where, whose = (f" in {'; '.join(rows)}", "these") if rows else ("", "its")
            text = f"{title} was measured differently{where} ({otherwise}): {whose} figures must not be compared"
            parts.append(paragraph(f"{text} with the others.", kind="warning"))
        if sizes := own_sizes({of: one["protocol"] for of, one in both.items()}):
            parts.append(paragraph(sizes))
    for title, report in reports.items():
        of_run = f"{title}: " if others else ""
        warnings = report["protocol"].get("warnings", ())
        parts += [paragraph(f"Warning: {of_run}{text}", kind="warning") for text in warnings]
    return parts


def _measured_otherwise(name: str, reports: Mapping[str, Report]) -> dict[str, list[str]]:
    """The settings in which reports differ, and the titles of the figures that they decide; none where it is all."""
    evaluator = name.partition("-")[0]
    shown = [figures(name, report, report["protocol"]) for report in reports.values()]
    common = {key: measure.title for key, measure in shown[0].items() if all(key in of for of in shown)}
    found: dict[str, list[str]] = {}
    for key, title in common.items():
        protocols = {of: protocol_of_figure(evaluator, report["protocol"], key) for of, report in reports.items()}
        found.setdefault("; ".join(differing(protocols)), []).append(title)
    if not common:
        found["; ".join(_without_a_common_figure(evaluator, reports))] = []
    everywhere = len(found) == 1
    return {otherwise: [] if everywhere else titles for otherwise, titles in found.items() if otherwise}


def _without_a_common_figure(evaluator: str, reports: Mapping[str, Report]) -> list[str]:
    """Why they have none: of k-NN's lists those without a value that all have, as wholes."""
    protocols = {of: protocol_of_figure(evaluator, report["protocol"]) for of, report in reports.items()}
    headlines = differing(protocols)
    for key in VOTED_BY if evaluator == "knn" else ():
        lists = {of: in_list(report["protocol"].get(key)) for of, report in reports.items()}
        first, *others = map(set, lists.values())
        for of, protocol in protocols.items():
            if first.intersection(*others):
                protocol.pop(key, None)
            elif key in protocol:
                protocol[key] = reports[of]["protocol"][key]
    return differing(protocols) or headlines


def figures(name: str, result: Report, protocol: Mapping[str, JSON]) -> dict[str, Measure]:
    """The measures of one model's part of a report, by name; of the suite those of its classifiers too.

    protocol: of the whole report.
    """
    if name.partition("-")[0] == "knn":
        return _of_knn(result, protocol)
    found: dict[str, Measure] = {}
    for part in PARTS_OF_SUITE:
        if name == "suite" and part in result:
            settings = protocol.get(part)  # of k-NN; those of the others are the linear evaluator's
            own = _of_knn(result[part], settings) if isinstance(settings, Mapping) else read_measures(result[part])
            found |= {
                f"{part}.{key}": replace(measure, title=f"{CLASSIFIERS[part]}, {measure.title}")
                for key, measure in own.items()
            }
    return found or read_measures(result) if "measures" not in result else found | read_measures(result)


def _of_knn(result: Report, protocol: Mapping[str, JSON]) -> dict[str, Measure]:
    """By the names and titles that figures have now, with each temperature that is not the usual one."""
    found: dict[str, Measure] = {}
    for key, measure in read_measures(result).items():
        temperature, title = protocol_of_figure("knn", protocol, key).get("temperature"), measure.title
        if isinstance(temperature, int | float) and temperature != USUAL_TEMPERATURE and ", temperature" not in title:
            title += f", temperature {temperature:g}"
        name = figure_name("knn", protocol, key)
        found[name] = replace(measure, name=name, title=title)
    return found


def _words(name: str, report: Report) -> str:
    """The title of a report, with what `which` and `step` picked."""
    first, *picked = name.split("-")
    first = classifier_of(first, report)
    return ", ".join([NAMES.get(first, first.replace("_", " ")), *([" ".join(picked)] if picked else [])])


def _cell(measure: Measure | None) -> str | Cell:
    if measure is None:
        return "-"
    is_share = measure.unit == "%"
    small = "" if measure.spread is None else f"+- {measure.spread:.2g}"
    if measure.interval:
        low, high = (f"{limit:.1f}" if is_share else f"{limit:.3g}" for limit in measure.interval)
        small = f"{small} ({low} to {high})".strip()
    if is_share:
        return Cell(f"{measure.value:.2f} %", small, measure.value / 100)
    return Cell(f"{measure.value:.4g} {measure.unit}".strip(), small)


def told_protocol(protocol: Report) -> list[str]:
    """How it was measured, in sentences: on which images, then with which weights and settings."""
    subject, told = protocol.get("subject") or {}, []
    if "images" in protocol:
        # classes are counted where figures are against the labels
        labels = f"against their {protocol['num_classes']} classes" if "num_classes" in protocol else "without labels"
        told.append(f"Measured on {protocol['images']}, {labels}.")
    elif "train" in protocol:
        test = protocol.get("test", protocol["train"])
        counts = [f" ({protocol[key]:,} images)" if key in protocol else "" for key in ("num_train", "num_test")]
        classes = f", {protocol['num_classes']} classes" if "num_classes" in protocol else ""
        size = f", {protocol['size']} pixels" if "size" in protocol else ""
        others = ", each by all others" if protocol.get("leave_one_out") else f" and {test}{counts[1]}"
        told.append(f"Measured on {protocol['train']}{counts[0]}{others}{classes}{size}.")
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
