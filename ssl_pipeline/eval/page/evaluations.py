"""The part of a run's page on its evaluations: the table, classes, confused pairs, nearest neighbours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.eval.page.html import cell_of, figure, list_of, paragraph, section, table_of
from ssl_pipeline.eval.page.thumbnails import thumbnail
from ssl_pipeline.eval.table import MODELS

REPORTS = {"suite": "eval.suite", "knn": "eval.knn", "linear": "eval.linear"}
MOST_CLASSES = 100

Report = Mapping[str, Any]
"""A report as it stands in its file."""


def read_reports(run: Path) -> dict[str, Report]:
    """The reports in `DIR/eval` by name; ConfigError for a file that is none."""
    found: dict[str, Report] = {}
    for name, command in REPORTS.items():
        path = run / "eval" / f"{name}.json"
        if path.is_file():
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
                float(report["top1"]), dict(report["baselines"]), dict(report["protocol"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} is not a report of {command} ({error}). Run it again.") from None
            found[name] = report
    return found


def evaluation_sections(reports: Mapping[str, Report]) -> list[str]:
    """What was evaluated, or how to do it; ConfigError for a report that lacks something."""
    try:
        return _sections(reports)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        files = ", ".join(f"eval/{name}.json" for name in reports)
        raise ConfigError(f"A report among {files} lacks {error}. Run its evaluator again.") from None


def _sections(reports: Mapping[str, Report]) -> list[str]:
    if not reports:
        return [
            section("Evaluation", paragraph("Nothing was evaluated yet: python -m eval.suite run=DIR train= test="))
        ]
    protocol = next(iter(reports.values()))["protocol"]
    measured = (
        f"{protocol['train']} ({protocol['num_train']:,} images) and {protocol['test']} ({protocol['num_test']:,})"
    )
    about = [
        f"{protocol.get('label', 'the backbone')}: {_weights(protocol)}",
        f"Measured on {measured}, {protocol['num_classes']} classes, {protocol['size']} pixels.",
    ]
    parts = [paragraph(text) for text in about]
    parts += [paragraph(f"Warning: {text}", kind="warning") for text in protocol.get("warnings", ())]
    parts.append(_results(reports))
    found = [section("Evaluation", *parts)]
    suite = reports.get("suite")
    if suite is not None:
        found += [_classes(suite), _neighbours(suite)]
    return found


def _weights(protocol: Report) -> str:
    subject = protocol.get("subject", {})
    sha256 = subject.get("weights_sha256")
    return f"{subject.get('weights', 'no weights')}" + (f"; SHA-256 {str(sha256)[:16]}" if sha256 else "")


def _results(reports: Mapping[str, Report]) -> str:
    """A row for each measure, a column for each model, the interval beside each top-1."""
    models = [name for name in MODELS if name in _models_of(next(iter(reports.values())))]
    rows: list[list[str]] = []
    suite = reports.get("suite")
    for name, report in reports.items():
        if suite is not None and name != "suite" and report["protocol"].get("subject") == suite["protocol"]["subject"]:
            continue  # it is in the suite's
        for title, measured in _measures(name, report).items():
            rows.append([title, *(measured.get(model, "-") for model in models)])
    return table_of(["", *(MODELS[model] for model in models)], rows)


def _models_of(report: Report) -> dict[str, Report]:
    return {**report["baselines"], "pretrained": report}


def _measures(name: str, report: Report) -> dict[str, dict[str, str]]:
    """Title -> model -> cell."""
    found: dict[str, dict[str, str]] = {}
    for model, result in _models_of(report).items():
        of_knn: Report = {"suite": result.get("knn"), "knn": result}.get(name) or {}
        for k, accuracy in of_knn.get("by_k", {}).items():
            interval = of_knn.get("top1_interval_by_k", {}).get(k)
            found.setdefault(f"k-NN top-1, k={k}", {})[model] = cell_of(accuracy["top1"], interval)
        if name == "linear":
            found.setdefault(f"{result['solver']} top-1", {})[model] = cell_of(
                result["top1"], result.get("top1_interval")
            )
        for solver in ("sgd", "logistic") if name == "suite" else ():
            if solver in result:
                probe = result[solver]
                found.setdefault(f"{solver} top-1", {})[model] = cell_of(probe["top1"], probe["top1_interval"])
        for classifier, classes in result.get("by_class", {}).items():
            balanced = cell_of(classes["balanced_accuracy"])
            found.setdefault(f"{classifier} balanced accuracy", {})[model] = balanced
        if name == "suite":
            found.setdefault("RankMe", {})[model] = f"{result['rankme']:.1f} ({result['rankme_percent']:.0f} %)"
            alpha = result["alpha"]
            found.setdefault("alpha-ReQ", {})[model] = "-" if alpha is None else f"{alpha:.2f}"
    return found


def _classes(suite: Report) -> str:
    """Each class, worst first, and what is confused most, for the first linear classifier."""
    by_class = suite["by_class"]
    name = next(classifier for classifier in by_class if classifier != "knn" or len(by_class) == 1)
    rows = [row for row in by_class[name]["per_class"] if row["images"]]
    rows.sort(key=lambda row: row["top1"])
    shown = [
        [row["class"], str(row["images"]), cell_of(row["top1"]), cell_of(row["precision"])]
        for row in rows[:MOST_CLASSES]
    ]
    confused = [
        f"{pair['class']} taken for {pair['taken_for']}: {pair['images']}" for pair in by_class[name]["confused"]
    ]
    more = "" if len(rows) <= MOST_CLASSES else paragraph(f"The {MOST_CLASSES} worst of {len(rows)} classes.")
    pairs = (
        [paragraph("Most confused:"), list_of(confused)] if confused else [paragraph("No image is taken for another.")]
    )
    return section(f"By class ({name})", more, table_of(["class", "images", "recognised", "precision"], shown), *pairs)


def _neighbours(suite: Report) -> str:
    """Test images with their nearest training images; a sentence where the images are gone or others."""
    protocol, found = suite["protocol"], suite["neighbours"]
    try:
        train, test = open_shards(str(protocol["train"])), open_shards(str(protocol["test"]))
        if {"train": train.fingerprint, "test": test.fingerprint} != suite["fingerprints"]:
            raise DataError(f"{protocol['train']} or {protocol['test']} holds other images now.")
        train_labels, test_labels, rows = _labels(train), _labels(test), []
        for sample, nearest, similar in zip(found["test"], found["train"], found["similarity"], strict=True):
            own = test_labels[sample]
            pictures = [figure(thumbnail(test, sample), own, kind="query")]
            for number, similarity in zip(nearest, similar, strict=True):
                other = train_labels[number]
                kind = "same" if other == own else "other"
                pictures.append(figure(thumbnail(train, number), f"{other} {similarity:.2f}", kind=kind))
            rows.append(f'<div class="neighbours">{"".join(pictures)}</div>')
    except (DataError, OSError, ValueError, IndexError) as error:
        return section("Nearest neighbours", paragraph(f"The images cannot be shown: {error}"))
    about = "Test images (left) and the training images most similar to them, with the cosine of their features."
    return section("Nearest neighbours", paragraph(about), *rows)


def _labels(index: ShardIndex) -> Sequence[str]:
    """The class of each image as it is called."""
    labels: NDArray = np.asarray(index.labels())
    return [str(label) if index.class_names is None else index.class_names[label] for label in labels.tolist()]
