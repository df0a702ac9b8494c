"""What a run has learnt, in tables, from the files that evaluators have written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.config import Config, ConfigError, printable, run_command
from ssl_pipeline.eval.columns import OTHERWISE, evaluator_of, settings_given, with_the_suite
from ssl_pipeline.eval.differences import doubts, measures_within_interval, within_interval_of_baselines
from ssl_pipeline.eval.labelled_sets import UNKNOWN, labelled_sets
from ssl_pipeline.eval.measures import format_table, percent, read_measures
from ssl_pipeline.eval.one_figure import protocol_of_figure
from ssl_pipeline.eval.results import CLASSIFIERS, Report, classifier_of, read_reports
from ssl_pipeline.files import JSON
from ssl_pipeline.run.directory import require_directory

MODELS = {"raw_pixels": "raw pixels", "random": "random initialisation", "pretrained": "pretrained"}
EVALUATORS = ("knn", "linear", "classifier")
WITH_BASELINES = ("knn", "linear")
KNN_USUAL: Mapping[str, JSON] = {"k": [20], "temperature": 0.07, "leave_one_out": False, "per_class": None}
"""Settings of k-NN that its title says where they are others."""


class TableConfig(Config):
    """Raw pixels, random initialisation and the backbone of a run, or of whatever was measured there, under k-NN and
    linear probe; the run's own classifier; and what the other evaluators have found."""

    positional = "run"

    run: Path
    """The run's directory, after eval.knn and eval.linear with baselines=true, or any other evaluator."""


def read_run(run: Path) -> dict[str, Report]:
    """The reports of a run; ConfigError if there is no such directory, or none in it."""
    reports = read_reports(run)
    if not reports and "," in str(run) and not run.exists():
        raise ConfigError(f"eval.table shows one run. Got run={run}; python -m eval.report run={run} compares several.")
    require_directory(run)
    if not reports:
        raise ConfigError(
            f"{run} has no report of an evaluator in eval/. "
            f"Run first: python -m eval.knn run={shlex.quote(str(run))} {labelled_sets(run) or UNKNOWN} baselines=true"
        )
    return reports


def titles_of(reports: Mapping[str, Report]) -> dict[str, str]:
    """What the columns are called, by evaluator: eval.linear's after the classifier that it has trained, eval.knn's
    with the settings of its headline that are not the default ones.
    """
    return {name: _title(name, reports[name]) for name in _columns(reports)}


def _title(name: str, report: Report) -> str:
    evaluator, _, otherwise = name.partition(OTHERWISE)
    settings = otherwise.split(", ") if otherwise else []
    if evaluator == "knn":
        own = protocol_of_figure("knn", report.get("protocol", {}))
        settings = [word for word in settings_given(own, but_for=KNN_USUAL) if word not in settings] + settings
    return ", ".join([f"{CLASSIFIERS[classifier_of(evaluator, report)]} top-1", *settings])


def _columns(reports: Mapping[str, Report]) -> list[str]:
    """The names of the reports with a top-1, those of one evaluator side by side."""
    return [name for evaluator in EVALUATORS for name in reports if evaluator_of(name) == evaluator]


def top1_of(reports: Mapping[str, Report], run: Path) -> dict[str, dict[str, float]]:
    """`{"knn": {"raw_pixels": percent, "random": ..., "pretrained": ...}, "linear": ...}`, as far as it was measured.

    Without baselines that were measured by another classifier. Raises ConfigError for a report that lacks it.
    """
    found = {}
    for name in _columns(reports):
        report = reports[name]
        try:
            found[name] = {
                model: float(result["top1"])
                for model, result in report["baselines"].items()
                if result.get("solver", report.get("solver")) == report.get("solver")
            }
            found[name]["pretrained"] = float(report["top1"])
        except (KeyError, TypeError, ValueError) as error:
            raise _no_report(run, name, error) from None
    return found


def _no_report(run: Path, name: str, error: Exception) -> ConfigError:
    name = evaluator_of(name)
    return ConfigError(
        f"{run}/eval/{name}.json is not a report of eval.{name} ({error}). Run python -m eval.{name} again."
    )


@dataclass(frozen=True)
class ReportedModel:
    """The network that reports are about: what it is called, and where its weights come from (empty: unknown)."""

    label: str = MODELS["pretrained"]
    weights: str = ""

    def __str__(self) -> str:
        return f"the {self.label} backbone" if self.label == MODELS["pretrained"] else self.label


def reported_model(reports: Mapping[str, Report], run: Path) -> ReportedModel:
    """What the reports in a directory are about; ConfigError if those of the table are about different networks."""
    found = {name: read for name in _columns(reports) if (read := _about(reports[name], run, name))}
    first = next(iter(found), "")
    for name, (network, reported) in found.items():
        if network != found[first][0]:
            one, other = (f"{each.label} ({each.weights})" for each in (found[first][1], reported))
            raise ConfigError(
                f"{run}/eval/{first}.json and {name}.json are about different networks: {one}, and {other}. Run the "
                "evaluator again whose report is not about the network that you want."
            )
    return next((reported for _, reported in found.values()), ReportedModel())


def _about(report: Report, run: Path, name: str) -> tuple[dict[str, object], ReportedModel] | None:
    """What identifies the network of a report, wherever its run is, and what it is called."""
    try:
        protocol = report.get("protocol", {})
        about = dict(protocol.get("subject", {}))
        if not about:
            return None
        of_a_run = about.pop("run", None) is not None
        label = protocol.get("label") or (MODELS["pretrained"] if of_a_run else about["backbone"]["name"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_report(run, name, error) from None
    return about, ReportedModel(str(label), str(about.get("weights", "")))


def summary(
    top1: Mapping[str, Mapping[str, float]], titles: Mapping[str, str], reported: ReportedModel = ReportedModel()
) -> str:
    """The table, where raw pixels are ahead, and how many times smaller the k-NN error became."""
    measured = {name: title for name, title in titles.items() if name in top1}
    labels = MODELS | {"pretrained": reported.label}
    rows = [
        (label, *(percent(top1[name].get(model)) for name in measured))
        for model, label in labels.items()
        if model == "pretrained" or any(name in top1 for name in WITH_BASELINES)
    ]
    lines = [format_table(("", *measured.values()), rows), ""]
    lines += compare_with_raw_pixels(top1, titles, reported)
    if "random" in top1.get("knn", {}):
        random, pretrained = (100.0 - top1["knn"][model] for model in ("random", "pretrained"))
        ratio = f"{random / pretrained:.1f} times smaller" if pretrained else "none is left"
        if 0 < random < pretrained:
            ratio = f"{pretrained / random:.1f} times larger"
        measured_one = f"{pretrained:.2f} % {reported.label}"
        lines.append(f"k-NN error: {random:.2f} % at random initialisation, {measured_one}: {ratio}.")
    if reported.weights:
        lines.append(f"{reported.label}: {reported.weights}")
    return "\n".join(lines)


def compare_with_raw_pixels(
    top1: Mapping[str, Mapping[str, float]], titles: Mapping[str, str], reported: ReportedModel
) -> list[str]:
    """One sentence per evaluator that raw pixels do not lose, and one for those that they do."""
    compared = [name for name in top1 if "raw_pixels" in top1[name]]
    if not any(name in top1 for name in WITH_BASELINES):
        return []
    if not compared:
        return ["No baselines were measured: run the evaluators with baselines=true."]
    lines, lost = [], []
    for name in compared:
        raw, pretrained = top1[name]["raw_pixels"], top1[name]["pretrained"]
        if raw < pretrained:
            lost.append(titles[name])
        else:
            relation = "equal" if raw == pretrained else "beat"
            lines.append(
                f"Raw pixels {relation} {reported} in {titles[name]}: {percent(raw)} against {percent(pretrained)}."
            )
    if lost:
        name = str(reported).replace("the ", "The ", 1) if reported.label == MODELS["pretrained"] else str(reported)
        lines.append(f"{name} is ahead of raw pixels in {' and '.join(lost)}.")
    return lines


def other_tables(reports: Mapping[str, Report], run: Path) -> list[str]:
    """A table for each report of another evaluator: a row for each measure, a column for each model."""
    tables = []
    for name, report in reports.items():
        if evaluator_of(name) in EVALUATORS or name == "suite" or "measures" not in report:
            continue  # the suite writes its figures into reports of their own
        try:
            tables.append(_table_of(name, report))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _no_report(run, name, error) from None
    return tables


def notes(reports: Mapping[str, Report], reported: ReportedModel) -> list[str]:
    """Which figures do not differ, and the protocol of each, as named in results.csv."""
    titles, labels = titles_of(reports), MODELS | {"pretrained": reported.label}
    lines = [
        line
        for name, title in titles.items()
        for line in within_interval_of_baselines(title, reports[name], reported.label, labels)
    ]
    hashes = [
        f"{title} {reports[name]['protocol_hash']}"
        for name, title in titles.items()
        if "protocol_hash" in reports[name]
    ]
    return lines + ([f"Protocols, as in eval/results.csv: {', '.join(hashes)}."] if hashes else [])


def _table_of(name: str, report: Report) -> str:
    models = {**report["baselines"], "pretrained": report}
    cells = {model: read_measures(result) for model, result in models.items()}
    rows = [
        [measure.title, *(own[key].cell() if key in own else "-" for own in cells.values())]
        for key, measure in cells["pretrained"].items()
    ]
    labels = MODELS | {"pretrained": report["protocol"].get("label") or MODELS["pretrained"]}
    table = format_table([name.replace("_", " "), *(labels.get(model, model) for model in models)], rows)
    return "\n".join((table, *measures_within_interval(report, labels)))


def main(config: TableConfig) -> None:
    reports = with_the_suite(read_run(config.run))
    parts = other_tables(reports, config.run)
    if top1 := top1_of(reports, config.run):
        reported = reported_model(reports, config.run)
        text = summary(top1, titles_of(reports), reported)
        parts.insert(0, "\n".join((text, *notes(reports, reported))))
    print("\n\n".join(parts))
    for doubt in doubts(reports, titles_of(reports)):
        print(printable(f"warning: {doubt}"))


def command(name: str = "python -m eval.table") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(TableConfig, main, command=name)
