"""The classifier that a run has learnt itself, a fine-tuned one or a semi-supervised method's, on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor

from ssl_pipeline.config import ConfigError, PlaceText, read_yaml
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.shards.origins import display_name
from ssl_pipeline.eval.accuracy import ByClass, by_class, top_k_accuracy
from ssl_pipeline.eval.calibration import BINS, expected_calibration_error
from ssl_pipeline.eval.classes import classes_json, print_classes
from ssl_pipeline.eval.features.classes import (
    OpenedClassifier,
    RunClassifierConfig,
    class_probabilities,
    open_classifier,
)
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.intervals import resampled_interval, share_interval
from ssl_pipeline.eval.labelled import classes_of, look_at_first
from ssl_pipeline.eval.measures import format_table, percent, with_interval
from ssl_pipeline.eval.protocol import write_report_to
from ssl_pipeline.files import JSON


class ClassifierConfig(RunClassifierConfig):
    """Accuracy, balanced accuracy, per-class recall and calibration of the classifier that a run has learnt."""

    test: PlaceText
    """Labelled test images, with the classes that the method learnt: shards, or a folder of class folders or a zip of
    one, which is packed once."""


@dataclass(frozen=True)
class Classified:
    """What a classifier makes of labelled images, in percent, each with its 95 % interval.

    ece: the expected calibration error. classes: images, recall and precision of each class.
    """

    top1: float
    top1_interval: tuple[float, float]
    top5: float
    balanced: float
    balanced_interval: tuple[float, float]
    ece: float
    ece_interval: tuple[float, float]
    classes: ByClass


def measure_classified(probabilities_NC: Tensor, labels_N: Tensor) -> Classified:
    """Shapes: probabilities (N, C), labels (N,) below C. A class without images counts in no mean."""
    num_images, num_classes = probabilities_NC.shape
    confidence_N, guesses_N = probabilities_NC.max(dim=1)
    right_N = guesses_N == labels_N

    def balanced_of(chosen_N: Tensor) -> float:
        labels, right = labels_N[chosen_N], right_N[chosen_N]
        images_C, right_C = (torch.bincount(part, minlength=num_classes) for part in (labels, labels[right]))
        return 100.0 * (right_C / images_C)[images_C > 0].mean().item()

    def ece_of(chosen_N: Tensor) -> float:
        return expected_calibration_error(confidence_N[chosen_N], right_N[chosen_N])

    images_C = torch.bincount(labels_N).double()
    images_C = images_C[images_C > 0]
    balanced_as = (len(images_C) ** 2 / images_C.reciprocal().sum()).item()  # Kish's number for weights 1 / images_C
    accuracy = top_k_accuracy(probabilities_NC, labels_N)
    classes = by_class(guesses_N, labels_N, num_classes=num_classes)
    return Classified(
        top1=accuracy["top1"],
        top1_interval=share_interval(accuracy["top1"], num_images),
        top5=accuracy["top5"],
        balanced=classes.balanced,
        balanced_interval=resampled_interval(balanced_of, num_images, counted_as=balanced_as),
        ece=expected_calibration_error(confidence_N, right_N),
        ece_interval=resampled_interval(ece_of, num_images),
        classes=classes,
    )


def evaluate_classifier(config: ClassifierConfig) -> dict[str, JSON]:
    """The report as written to `eval/classifier.json`, with tables on stdout; ConfigError if it cannot be."""
    opened, index = open_classifier(config), open_shards(config.test)
    where = f"test={display_name(config.test)}"
    if not len(index):
        raise ConfigError(f"{where} has no images.")
    labels_N = torch.from_numpy(classes_of(index, where, num_classes=opened.num_classes, names=opened.class_names))
    look_at_first(index, opened.preprocessing.size)
    batches = class_probabilities(opened, index, config, description="classifier, test images")
    found = measure_classified(torch.cat(list(batches)), labels_N)
    names = opened.names_beside(index.class_names)
    _print(found, names, opened.label)
    return _report(config, opened, found, names)


def _print(found: Classified, names: tuple[str, ...], label: str) -> None:
    num_images = int(found.classes.images.sum())
    rows = [
        ("top-1", with_interval(found.top1, num_images)),
        ("top-5", percent(found.top5)),
        ("balanced accuracy", _spanned(found.balanced, found.balanced_interval)),
        ("calibration error (ECE)", _spanned(found.ece, found.ece_interval)),
    ]
    print(format_table((f"own classifier, {label}", f"{num_images:,} images"), rows))
    print_classes("The classifier", found.classes, names)


def _report(
    config: ClassifierConfig, opened: OpenedClassifier, found: Classified, names: tuple[str, ...]
) -> dict[str, JSON]:
    preprocessing = opened.preprocessing
    return {
        "top1": found.top1,
        "top1_interval": found.top1_interval,
        "top5": found.top5,
        "balanced_accuracy": found.balanced,
        "balanced_accuracy_interval": found.balanced_interval,
        "ece": found.ece,
        "ece_interval": found.ece_interval,
        "by_class": classes_json(found.classes, names),
        "baselines": {},
        "protocol": {
            "label": opened.label,
            "subject": opened.about,
            "size": preprocessing.size,
            "own_size": preprocessing.size,
            "interpolation": preprocessing.interpolation,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "precision": config.precision,
            "train": _learnt_from(config.run),
            "test": config.test,
            "num_test": int(found.classes.images.sum()),
            "num_classes": opened.num_classes,
            "calibration_bins": BINS,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    }


def _learnt_from(run: Path) -> JSON:
    """The shards that the classifier has learnt from, as far as the run's settings say; one place as plain text."""
    try:
        tree = read_yaml((run / "config.yaml").read_text(encoding="utf-8"), where="config.yaml")
    except (OSError, ConfigError):
        return None
    data = tree.get("data") if isinstance(tree, dict) else None
    if not isinstance(data, dict):
        return None
    labelled = data.get("labelled")
    shards = labelled.get("shards") if isinstance(labelled, dict) else data.get("shards")
    return shards if isinstance(shards, str) else str(shards)


def _spanned(value: float, interval: tuple[float, float]) -> str:
    return f"{percent(value)} ({interval[0]:.1f} to {interval[1]:.1f})"


def main(config: ClassifierConfig) -> None:
    write_report_to(config.run, "classifier", evaluate_classifier(config), step=config.step)


def command(name: str = "python -m eval.classifier") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_evaluator(ClassifierConfig, main, command=name, check=open_classifier)
