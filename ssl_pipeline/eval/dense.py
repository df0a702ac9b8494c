"""Segmentation from the frozen patch features of a backbone, of images with masks.

Images are stretched to a square whole, nothing is augmented; what is predicted for the patches is interpolated to the
size of each mask, and compared with all its pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from ssl_pipeline.backbones import Backbone, TokenBackbone
from ssl_pipeline.config import ConfigError, printable, run_command
from ssl_pipeline.eval.dense_measures import measure_dense
from ssl_pipeline.eval.dense_sets import DenseConfig, DenseSets, choose_patches, open_sets
from ssl_pipeline.eval.features.kinds import FeatureKinds
from ssl_pipeline.eval.features.models import EvaluatedModel, baselines_of, open_model
from ssl_pipeline.eval.features.passes import feature_pass
from ssl_pipeline.eval.images import say_what_is_kept
from ssl_pipeline.eval.labelled import say
from ssl_pipeline.eval.measures import Found, format_table, percent
from ssl_pipeline.eval.protocol import Measured, ReportConfig, conclude, pass_protocol
from ssl_pipeline.files import JSON


def evaluate_dense(config: DenseConfig) -> tuple[Measured[Found], dict[str, JSON]]:
    """What is found, and the evaluator's part of the protocol."""
    model = open_model(config)
    grid, warnings = _grid_of(model)
    sets = open_sets(config)
    patches = choose_patches(sets, grid, config)
    say(warnings)
    print(printable(f"{model.label}: {model.weights}"), flush=True)

    def measure(one: EvaluatedModel) -> Found:
        with _map_features(config, one, sets) as (train_ILD, test_ILD):
            return measure_dense(train_ILD, test_ILD, patches, sets=sets, grid=grid, config=config)

    baselines = baselines_of(model) if config.baselines else {}
    found = {
        name: (baseline, measure(baseline))
        for name, baseline in baselines.items()
        if isinstance(baseline.backbone, Backbone)  # raw pixels are not patches
    }
    protocol = {
        **pass_protocol(config, model),
        "fit": "stretch",
        "grid": grid,
        "train": f"{config.source}: {config.train}",
        "num_train": len(sets.train),
        "train_fingerprint": sets.train.fingerprint,
        "test": f"{config.source}: {config.test}",
        "num_test": len(sets.test),
        "test_fingerprint": sets.test.fingerprint,
        "num_classes": len(sets.numbers),
        "warnings": warnings,
    }
    own = set(DenseConfig.model_fields) - set(ReportConfig.model_fields)
    settings = config.model_dump(include=own - {"source", "images", "masks", "train", "test"}, mode="json")
    return Measured(model.label, measure(model), found, protocol), settings


def _grid_of(model: EvaluatedModel) -> tuple[tuple[int, int], list[str]]:
    """Rows and columns of patches, and what is to be said of a network without tokens; ConfigError without a map."""
    backbone = model.backbone
    if not isinstance(backbone, Backbone):
        raise ConfigError(
            "Segmentation needs the patch tokens of a ViT, or the last map of a CNN. Raw pixels have neither."
        )
    size = model.preprocessing.size
    _, grid = backbone.map_shape(size)
    if isinstance(backbone, TokenBackbone):
        return grid, []
    rows, columns = grid
    return grid, [
        f"'{backbone.name}' has no patch tokens: the {rows} x {columns} places of its last map are taken, each for "
        f"{size // rows} pixels of {size}."
    ]


@contextmanager
def _map_features(config: DenseConfig, model: EvaluatedModel, sets: DenseSets) -> Iterator[tuple[Tensor, Tensor]]:
    """Features of the patches (I, L, D) of both sets, memory-mapped from the cache or from a temporary folder."""
    model = replace(model, preprocessing=replace(model.preprocessing, fit="stretch"))
    network = FeatureKinds(model.backbone, ("map",))
    with TemporaryDirectory() as meanwhile:
        place = Path(meanwhile) if config.directory is None else config.directory / "eval" / "cache"
        train, test = (
            feature_pass(place, model, network, index, config, description=f"{model.label}, {name} images")
            for name, index in (("training", sets.train), ("test", sets.test))
        )
        yield train.features["map"], test.features["map"]


def class_table(found: Found, heads: tuple[str, ...]) -> str:
    """Intersection over union of each class by each head."""
    by_head = [found.details[head]["iou_by_class"] for head in heads]  # type: ignore[index, call-overload]
    rows = [
        [printable(of_class[0]["class"]), *(percent(one["iou"]) for one in of_class)]
        for of_class in zip(*by_head, strict=True)
    ]
    return format_table(["IoU", *heads], rows)


def main(config: DenseConfig) -> None:
    say_what_is_kept(config.directory)
    measured, settings = evaluate_dense(config)
    print(class_table(measured.result, config.heads) + "\n")
    conclude(config, "dense", measured, settings)


def command(name: str = "python -m eval.dense") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(DenseConfig, main, command=name)
