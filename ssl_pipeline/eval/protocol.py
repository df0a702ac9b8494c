"""What all evaluators share: labelled images, features of the model and its baselines, the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, TypeVar

import timm
import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import TokenBackbone
from ssl_pipeline.config import PlaceText, printable
from ssl_pipeline.config.output_file import Folder
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.eval.columns import measured_otherwise
from ssl_pipeline.eval.features.kinds import FeatureKinds, Kind
from ssl_pipeline.eval.features.models import EvaluatedModel, baselines_of, open_model
from ssl_pipeline.eval.features.passes import PassConfig, feature_pass, features_in_memory
from ssl_pipeline.eval.intervals import METHOD
from ssl_pipeline.eval.labelled import LabelledImages
from ssl_pipeline.eval.measures import Found, measures_of, measures_table
from ssl_pipeline.eval.results import RESULTS, Report, add_results, protocol_hash
from ssl_pipeline.files import JSON, write_json

Result = TypeVar("Result")
LAST_BLOCKS = 4  # of DINO's and DINOv2's linear evaluation


class ReportConfig(PassConfig):
    """A model, and where its results are kept."""

    baselines: bool = False
    """Whether raw pixels and the same backbone at random initialisation are measured too."""
    output: Folder | None = None
    """Folder in which `eval/` gets the report and cached features; by default the run; without either nothing is
    kept."""

    @property
    def directory(self) -> Path | None:
        """The folder of `eval/`, if there is one."""
        return self.output or self.run


class EvaluationConfig(ReportConfig):
    """A model with the labelled images to measure it on."""

    train: PlaceText
    """Labelled training images: shards, or a folder of class folders or a zip of one, which is packed once."""
    test: PlaceText
    """Labelled test images, with the same classes."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Features (M, D) and (N, D) with labels (M,) and (N,) below `num_classes`.

    of_kinds: those of other kinds (`FeatureKinds`) that were asked for and that the network has, training and test.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int
    of_kinds: Mapping[Kind, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Models:
    """What is measured: a network, and its baselines by their names."""

    model: EvaluatedModel
    baselines: Mapping[str, EvaluatedModel]


@dataclass(frozen=True)
class Measured(Generic[Result]):
    """An evaluator's results: the model's, the baselines', and how they were obtained."""

    label: str
    result: Result
    baselines: dict[str, tuple[EvaluatedModel, Result]]
    protocol: dict[str, JSON]

    def rows(self) -> list[tuple[str, Result]]:
        """Labels and results for a table, the model last."""
        return [(model.label, result) for model, result in self.baselines.values()] + [(self.label, self.result)]

    def report(self, to_json: Callable[[Result], dict[str, JSON]], settings: dict[str, JSON]) -> dict[str, JSON]:
        """What is written to `eval/NAME.json`; `settings` are the evaluator's part of the protocol."""
        baselines = {
            name: {**to_json(result), "about": model.about} for name, (model, result) in self.baselines.items()
        }
        return {**to_json(self.result), "baselines": baselines, "protocol": {**settings, **self.protocol}}


def open_models(config: EvaluationConfig) -> Models:
    """What the config names, and its baselines if they are asked for; says whose weights they are."""
    model = open_model(config)
    print(printable(f"{model.label}: {model.weights or model.about.get('images')}"), flush=True)
    return Models(model, baselines_of(model) if config.baselines else {})


def measure_models(
    config: EvaluationConfig,
    images: LabelledImages,
    measure: Callable[[LabelledFeatures], Result],
    *,
    kinds: tuple[Kind, ...] = (),
    models: Models | None = None,
) -> Measured[Result]:
    """`measure` on the features of the model and, if asked for, of its baselines; `models` are those of the config.

    kinds: of its tokens that are wanted besides its own features; ConfigError if it has none.
    """
    models = models or open_models(config)
    model = models.model
    FeatureKinds(model.backbone, kinds, last_blocks=last_blocks_of(model.backbone))  # refuses what it does not have
    features = model_features(config, model, images, kinds=kinds)
    baselines = {
        name: (baseline, measure(model_features(config, baseline, images, kinds=kinds)))
        for name, baseline in models.baselines.items()
    }
    return Measured(model.label, measure(features), baselines, protocol_of(config, model, images))


def protocol_of(config: EvaluationConfig, model: EvaluatedModel, images: LabelledImages) -> dict[str, JSON]:
    """What was measured on which images: every evaluator's part of the protocol."""
    return {
        **pass_protocol(config, model),
        "train": config.train,
        "num_train": len(images.train),
        "train_fingerprint": images.train.fingerprint,
        "test": config.test,
        "num_test": len(images.test),
        "test_fingerprint": images.test.fingerprint,
        "num_classes": images.num_classes,
        "warnings": images.warnings,
    }


def pass_protocol(config: PassConfig, model: EvaluatedModel) -> dict[str, JSON]:
    """What was measured, and how its features were computed."""
    return {
        "label": model.label,
        "subject": model.about,
        "size": model.preprocessing.size,
        "own_size": model.own_size,
        "interpolation": model.preprocessing.interpolation,
        "mean": model.preprocessing.mean,
        "std": model.preprocessing.std,
        "precision": config.precision,
        "dtype": config.dtype,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def model_features(
    config: EvaluationConfig, model: EvaluatedModel, images: LabelledImages, *, kinds: tuple[Kind, ...] = ()
) -> LabelledFeatures:
    """Features of both sets, memory-mapped from `DIR/eval/cache`, computed the first time; without DIR, in memory.

    kinds: of tokens that are wanted too, from the same pass, where the network has tokens; of at most LAST_BLOCKS.
    """
    kinds = kinds if isinstance(model.backbone, TokenBackbone) else ()
    train, test = (
        _kinds_of(config, model, index, name=name, kinds=kinds)
        for name, index in (("training", images.train), ("test", images.test))
    )
    return LabelledFeatures(
        train["pooled"],
        images.train_labels,
        test["pooled"],
        images.test_labels,
        images.num_classes,
        {kind: (train[kind], test[kind]) for kind in kinds},
    )


def features_of(config: ReportConfig, model: EvaluatedModel, index: ShardIndex, *, name: str) -> Tensor:
    """Features (N, D) float32 of a set of images, which are called `name`; as `model_features` of both sets."""
    return _kinds_of(config, model, index, name=name, kinds=())["pooled"]


def _kinds_of(
    config: ReportConfig, model: EvaluatedModel, index: ShardIndex, *, name: str, kinds: tuple[Kind, ...]
) -> dict[str, Tensor]:
    description, directory = f"{model.label}, {name} images", config.directory
    if directory is None and not kinds:
        return {"pooled": features_in_memory(config, model, index, description=description)}
    network = FeatureKinds(model.backbone, ("pooled", *kinds), last_blocks=last_blocks_of(model.backbone))
    with ExitStack() as stack:
        if directory is None:  # in memory once the folder is gone: its files stay mapped
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="ssl_pipeline-features-")))
        place = directory / "eval" / "cache"
        found = feature_pass(place, model, network, index, config, description=description).features
    return {kind: found[kind].float() for kind in ("pooled", *kinds)}


def last_blocks_of(network: nn.Module) -> int:
    return min(LAST_BLOCKS, network.num_blocks) if isinstance(network, TokenBackbone) else LAST_BLOCKS


def conclude(config: ReportConfig, evaluator: str, measured: Measured[Found], settings: dict[str, JSON]) -> None:
    """Print what an evaluator has measured as a table and write its report; `settings` are its own of the protocol."""
    print(measures_table(evaluator.replace("_", " "), measured.rows()))
    write_report(config, evaluator, measured.report(Found.to_json, settings))


def write_report(config: ReportConfig, name: str, report: dict[str, JSON]) -> None:
    """`DIR/eval/NAME.json` in the run, or in `output`; nothing without either.

    What `which` or `step` picks has its own file: `DIR/eval/NAME-student-step-80.json`.
    """
    if config.directory is not None:
        write_report_to(config.directory, name, report, which=config.which, step=config.picked_step)


def write_report_to(
    directory: Path, name: str, report: Mapping[str, JSON], *, which: str | None = None, step: int | None = None
) -> None:
    """`directory/eval/NAME.json`, with what `which` or `step` picks in its name, and its rows in results.csv."""
    picked = ([which] if which else []) + ([f"step-{step}"] if step else [])
    path = directory / "eval" / f"{'-'.join([name, *picked])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    shaped = in_regular_shape(name, report)
    before = _protocol_in(path)
    write_json(path, shaped)
    _say_what_went(path, before)
    add_results(path.parent, shaped)
    print(f"written to {path}")


def _protocol_in(path: Path) -> dict[str, JSON] | None:
    """That of a report, None where there is no whole one."""
    try:
        protocol = json.loads(path.read_text(encoding="utf-8"))["protocol"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return protocol if isinstance(protocol, dict) else None


def _say_what_went(path: Path, before: dict[str, JSON] | None) -> None:
    """Say that a report of other settings was replaced; its rows of results.csv stay."""
    now = _protocol_in(path)  # as it was written: tuples are lists there
    if before is not None and now is not None and (otherwise := measured_otherwise(before, now)):
        print(printable(f"{path} had figures of other settings (now {otherwise}); they stay in {RESULTS}."))


def in_regular_shape(evaluator: str, report: Report) -> dict[str, JSON]:
    """A report with its evaluator's name, the protocol's hash for its first measure, and `measures` of all models."""
    baselines = {name: {**of, "measures": measures_of(of)} for name, of in report["baselines"].items()}
    headline = next((measure["name"] for measure in measures_of(report)), "")
    return {
        "evaluator": evaluator,
        "protocol_hash": protocol_hash(evaluator, report["protocol"], headline),
        **report,
        "intervals": f"95 %, {METHOD}",
        "measures": measures_of(report),
        "baselines": baselines,
    }
