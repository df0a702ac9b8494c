"""The accuracy of the classifier that a run has learnt itself: a fine-tuned one, or a semi-supervised method's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import timm
import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.augment.central_crop import Interpolation
from ssl_pipeline.backbones import classifier_of_run
from ssl_pipeline.config import BatchSize, Config, ConfigError, Processes, printable, read_yaml, run_command
from ssl_pipeline.eval.accuracy import bootstrap_interval, by_class, top_k_accuracy
from ssl_pipeline.eval.classes import classes_json, print_classes
from ssl_pipeline.eval.features.extract import Precision
from ssl_pipeline.eval.features.models import EvaluatedModel, ModelConfig, open_model
from ssl_pipeline.eval.features.passes import choose_device
from ssl_pipeline.eval.monitors import ClassifierMonitor, ClassifierMonitorConfig
from ssl_pipeline.eval.table import format_table, percent, with_interval
from ssl_pipeline.files import JSON, write_json
from ssl_pipeline.schedule import Duration


class ClassifierConfig(Config):
    """Accuracy of a run's own classifier, with balanced accuracy, classes and confused pairs."""

    run: Path
    """The run's directory; its method learns to classify (supervised, FixMatch, ...)."""
    test: str
    """Shards of labelled test images, with the classes that the run has learnt."""
    step: Annotated[int, Field(gt=0)] | None = None
    """What it had after so many steps, exported or in a checkpoint, instead of the newest."""
    size: Annotated[int, Field(gt=0, le=8192)] | None = None
    """Side of the images in pixels; by default the run's evaluation size."""
    interpolation: Interpolation = "bicubic"
    """How images are resized, antialiased in either way."""
    batch_size: BatchSize = 256
    """Images per forward pass."""
    workers: Processes = 2
    """Processes that read and decode images."""
    device: str = "auto"
    """Device of the backbone: `auto` takes the GPU if there is one."""
    precision: Precision = "no"
    """Autocast of the backbone: `no` is float32."""


def evaluate_classifier(config: ClassifierConfig) -> dict[str, JSON]:
    """The report as it stands in `eval/classifier.json`, with a table on stdout; ConfigError if there is none."""
    given = {"run": config.run, "step": config.step, "size": config.size, "interpolation": config.interpolation}
    model = open_model(ModelConfig.model_validate(given))
    classifier, names = classifier_of_run(config.run, step=config.step)
    device = choose_device(config.device)
    settings = {"every": Duration(0), "val": config.test, "batch_size": config.batch_size}
    measured = ClassifierMonitor(
        ClassifierMonitorConfig.model_validate(settings | {"interpolation": config.interpolation}),
        model.preprocessing,
        classifier=classifier.to(device),
        num_classes=classifier.out_features,
        class_names=names,
        workers=config.workers,
        device=device,
        precision=config.precision,
    )
    scores_NC, labels_N = measured.scores(model.backbone.to(device)), measured.labels
    known = names or measured.images.class_names or ()
    names = tuple(known[number] if number < len(known) else str(number) for number in range(classifier.out_features))
    return _report(config, model, scores_NC, labels_N, names)


def _report(
    config: ClassifierConfig, model: EvaluatedModel, scores_NC: Tensor, labels_N: Tensor, names: tuple[str, ...]
) -> dict[str, JSON]:
    found = top_k_accuracy(scores_NC, labels_N)
    classes = by_class(scores_NC.argmax(dim=1), labels_N, num_classes=len(names))
    top1, balanced = with_interval(found["top1"], len(labels_N)), percent(classes.balanced)
    row = [printable(str(config.run)), top1, percent(found["top5"]), balanced]
    print(format_table(["classifier", "top-1", "top-5", "balanced"], [row]))
    print_classes("The classifier", classes, names)
    preprocessing = model.preprocessing
    return {
        **found,
        "top1_interval": bootstrap_interval(found["top1"], len(labels_N)),
        "by_class": classes_json(classes, names),
        "baselines": {},
        "protocol": {
            "label": model.label,
            "subject": model.about,
            "size": preprocessing.size,
            "interpolation": preprocessing.interpolation,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "precision": config.precision,
            "train": _learnt_from(config.run),
            "test": config.test,
            "num_test": len(labels_N),
            "num_classes": len(names),
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


def main(config: ClassifierConfig) -> None:
    report = evaluate_classifier(config)
    of_step = f"-step-{config.step}" if config.step else ""
    path = config.run / "eval" / f"classifier{of_step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    print(f"written to {path}")


def command(name: str = "python -m eval.classifier") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(ClassifierConfig, main, command=name)
