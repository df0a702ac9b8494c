"""Reports of evaluators as rows of one table, and which of them may be compared.

Every report has `evaluator`, `measures`, `baselines` with measures of their own, and `protocol`; `eval/results.csv` has
a row for each measure of each model, from whatever has been run in that directory.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_pipeline.config import ConfigError
from ssl_pipeline.config.arguments import leaves
from ssl_pipeline.eval.measures import measures_of
from ssl_pipeline.eval.one_figure import VOTES, protocol_of_figure
from ssl_pipeline.files import JSON, locked, sha256_of_json, without_nan, write_text

Report = Mapping[str, Any]
"""A report as it stands in its file."""

RESULTS = "results.csv"
COLUMNS = (
    "evaluator",
    "model",
    "label",
    "measure",
    "value",
    "unit",
    "low",
    "high",
    "spread",
    "protocol",
    "subject",
    "run",
    "step",
    "train",
    "test",
    "size",
)
FIRST_REPORTS = ("suite", "knn", "linear")
KEY = ("evaluator", "model", "subject", "protocol")  # of a row, with the kind of its figure

CLASSIFIERS = {
    "knn": "k-NN",
    "sgd": "linear probe",
    "logistic": "logistic regression",
    "classifier": "classifier",
}
"""What tables and pages call the classifiers whose top-1 they show, in the order in which they are looked for."""

ABOUT_THE_MODEL = {"label", "subject", "mean", "std", "own_size"}
ABOUT_THE_PROGRAM = {"torch", "timm", "faiss", "scikit-learn", "search"}  # versions, and ways to the same figures
PLACES = {"train", "test", "images"}  # of images, which their fingerprints tell better


def comparable(protocol: Mapping[str, JSON]) -> dict[str, JSON]:
    """What figures depend on besides the model: two may be compared if this is the same.

    Images are identified by their fingerprints, and by their path only where there is none.
    """
    dropped = ABOUT_THE_MODEL | ABOUT_THE_PROGRAM | {"warnings"}
    dropped |= {place for place in PLACES if f"{place}_fingerprint" in protocol}
    kept: dict[str, JSON] = {}
    for name, value in protocol.items():
        if name not in dropped:
            kept[name] = comparable(value) if isinstance(value, Mapping) else value
    return kept


def protocol_hash(evaluator: str, protocol: Mapping[str, JSON], figure: str = "") -> str:
    """16 hexadecimal digits that two results share if they may be compared; figure: the name of a measure."""
    return sha256_of_json(without_nan([evaluator, comparable(protocol_of_figure(evaluator, protocol, figure))]))[:16]


def differing(protocols: Mapping[str, Mapping[str, JSON]]) -> list[str]:
    """The settings in which protocols, by the name of what they measured, differ: `size: a 32, b 64`.

    Without the size where each network was measured at its own (`own_sizes`).
    """
    left_out = {"size"} if all(map(_at_its_own_size, protocols.values())) else set()
    shared = {name: dict(leaves(comparable(protocol))) for name, protocol in protocols.items()}
    keys = dict.fromkeys(key for settings in shared.values() for key in settings if key not in left_out)
    found = []
    for key in keys:
        values = {name: _shown(settings.get(key)) for name, settings in shared.items()}
        if len(set(values.values())) > 1:
            found.append(f"{key}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    return found


def own_sizes(protocols: Mapping[str, Mapping[str, JSON]]) -> str:
    """That networks were measured at different sizes, each at its own: a sentence; empty where they were not."""
    sizes = {name: protocol.get("size") for name, protocol in protocols.items()}
    if len(set(sizes.values())) < 2 or not all(map(_at_its_own_size, protocols.values())):
        return ""
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"Each network was measured as it was trained (size: {told})."


def _at_its_own_size(protocol: Mapping[str, JSON]) -> bool:
    """Whether no other size was asked for; reports of older versions do not say."""
    return protocol.get("size") is not None and protocol.get("size") == protocol.get("own_size")


def classifier_of(evaluator: str, report: Report) -> str:
    """The classifier of CLASSIFIERS that a report is about: those of eval.linear have two protocols."""
    return str(report.get("solver", "sgd")) if evaluator == "linear" else evaluator


def read_reports(directory: Path, *, picked: bool = False) -> dict[str, Report]:
    """The reports in `DIR/eval` by name, those of the suite first, each file read once.

    picked: whether those of a step or a picked network, which have longer names, are wanted too. Raises
    ConfigError for a file that is not one.
    """
    found: dict[str, Report] = {}
    paths = {path.stem: path for path in sorted((directory / "eval").glob("*.json")) if picked or "-" not in path.stem}
    for name in sorted(paths, key=lambda name: (_place(name), name)):
        try:
            report = json.loads(paths[name].read_text(encoding="utf-8"))
            dict(report["baselines"]), dict(report["protocol"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            command = f"eval.{name.partition('-')[0]}"
            raise ConfigError(
                f"{paths[name]} is not a report of {command} ({error}). Run python -m {command} again."
            ) from None
        found[name] = report
    return found


def _place(name: str) -> int:
    return FIRST_REPORTS.index(name) if name in FIRST_REPORTS else len(FIRST_REPORTS)


def rows_of(report: Report) -> list[dict[str, str]]:
    """A row of results.csv for each measure of the model and of its baselines."""
    evaluator, protocol = report["evaluator"], report["protocol"]
    shared = {
        "evaluator": evaluator,
        "train": protocol.get("train", protocol.get("images")),
        "test": protocol.get("test"),
        "size": protocol.get("size"),
    }
    models = [("pretrained", protocol.get("label", ""), protocol.get("subject", {}), report)]
    models += [(name, name, of.get("about", {}), of) for name, of in report["baselines"].items()]
    rows = []
    for model, label, about, result in models:
        told = {name: value for name, value in about.items() if name != "run"}
        own = {"model": model, "label": label, "subject": sha256_of_json(without_nan(told))[:16]}
        own |= {"run": str(about.get("run") or ""), "step": str(about.get("step") or "")}
        for measure in measures_of(result):
            low, high = measure["interval"] or (None, None)
            figures = {"measure": measure["name"], "value": measure["value"], "unit": measure["unit"]}
            figures |= {"low": low, "high": high, "spread": measure["spread"]}
            figures["protocol"] = protocol_hash(evaluator, protocol, measure["name"])
            row = {**shared, **own, **figures}
            rows.append({name: "" if row[name] is None else str(row[name]) for name in COLUMNS})
    return rows


def add_results(directory: Path, report: Report) -> None:
    """Write the rows of a report into `directory/results.csv`; rows of the same results are replaced, others stay."""
    path = directory / RESULTS
    with locked(directory):
        new = rows_of(report)
        replaced = set(map(_key, new))
        old = [row for row in read_results(path) if _key(row) not in replaced]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *new])
        write_text(path, text.getvalue())


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    """A row that has the same takes the other's place. Of k-NN the protocol tells k and temperature, and the name may
    be of an older version."""
    kind = VOTES.sub("", row["measure"]) if row["evaluator"] == "knn" else row["measure"]
    return (kind, *(row[name] for name in KEY))


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a results.csv, with the columns that there are now; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: row.get(name) or "" for name in COLUMNS} for row in csv.DictReader(file)]


def _shown(value: JSON) -> str:
    text = json.dumps(without_nan(value))
    return text if len(text) <= 40 else f"{text[:12]}..." if text.startswith('"') else text
