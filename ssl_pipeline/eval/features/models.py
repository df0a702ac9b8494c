"""What an evaluator measures: a run's backbone, a timm model, or the two baselines that need no pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import yaml
from pydantic import Field, model_validator
from torch import nn

from ssl_pipeline.augment.central_crop import Interpolation
from ssl_pipeline.augment.operations.base import IMAGENET_MEAN, IMAGENET_STD, Deviation, Mean
from ssl_pipeline.backbones import (
    Argument,
    Backbone,
    BackboneConfig,
    Preprocessing,
    check_image_sizes,
    create_backbone,
    errors_name_setting,
    load_run,
)
from ssl_pipeline.backbones.exported import exported_step
from ssl_pipeline.backbones.known import Known, known_of, normalised
from ssl_pipeline.config import Config, ConfigError, PlaceText, printable, validate
from ssl_pipeline.files import JSON

RAW_PIXELS = "raw_pixels"
RAW_PIXELS_SIDE = 32
RANDOM_SEED = 0


class ModelConfig(Config):
    """The backbone to measure: a run's, or a timm model."""

    run: Path | None = None
    """A run's directory: its newest backbone is measured, exported (backbone.safetensors) or in a checkpoint."""
    which: str | None = None
    """With `run`: a backbone of its checkpoints by name, `student` or `teacher`, instead of the one it exports."""
    step: Annotated[int, Field(gt=0)] | None = None
    """With `run`: the step to take, exported or in a checkpoint, instead of the newest."""
    checkpoint: Annotated[int, Field(gt=0)] | None = None
    """Older name of `step`."""
    backbone: str | None = None
    """Instead of a run: a timm model by name, or `raw_pixels`."""
    arguments: dict[str, Argument] = Field(default={})
    """With `backbone`: the model's arguments, `arguments.img_size=32`."""
    small_images: bool = False
    """With `backbone`: a CNN's 3x3 stem without max-pool."""
    weights: PlaceText | None = None
    """With `backbone`: a weights file, a run or a timm pretrained tag; without it the model is at random
    initialisation."""
    weights_from: str | None = None
    """With `weights`: `teacher` or `student` of a file, a backbone of a run by name."""
    size: Annotated[int, Field(gt=0, le=8192)] | None = None
    """Side of the images in pixels; by default the run's evaluation size, or `arguments.img_size`, or 224."""
    interpolation: Interpolation = "bicubic"
    """How images are resized, antialiased in either way; published figures of most ResNets are bilinear."""
    mean: Mean | None = None
    """With `backbone`: mean of the colour channels; by default that of the weights (a run's, a tag's, else the one
    that all of timm's weights of the model have), or ImageNet's."""
    std: Deviation | None = None
    """With `backbone`: standard deviation of the colour channels; by default as `mean`."""

    @model_validator(mode="after")
    def _one_model(self) -> ModelConfig:
        if (self.run is None) == (self.backbone is None):
            raise ValueError("Give either run=DIR or backbone=NAME.")
        given = [
            name
            for name in ("arguments", "small_images", "weights", "weights_from", "mean", "std")
            if getattr(self, name)
        ]
        if self.run is not None and given:
            raise ValueError(f"{given[0]} belongs to backbone=NAME. run=DIR brings its own.")
        architecture, _, tag = (self.backbone or "").partition(".")
        if tag:
            raise ValueError(
                f"backbone must be an architecture without a tag of pretrained weights. Got '{self.backbone}'; write "
                f"backbone={architecture} weights={tag}"
            )
        if self.weights_from and not self.weights:
            raise ValueError(f"weights_from={self.weights_from} says which network of weights is measured. Set both.")
        of_run = [name for name in ("which", "step", "checkpoint") if getattr(self, name)]
        if self.backbone is not None and of_run:
            raise ValueError(f"{of_run[0]} belongs to run=DIR. backbone=NAME is a single network.")
        if self.step and self.checkpoint and self.step != self.checkpoint:
            raise ValueError(f"step={self.step} and checkpoint={self.checkpoint} are the same setting. Leave one out.")
        return self

    @property
    def picked_step(self) -> int | None:
        """The step that is asked for, under either name."""
        return self.step or self.checkpoint


@dataclass(frozen=True)
class EvaluatedModel:
    """A frozen network with what its images need.

    `about` is JSON that identifies it; `config` builds the same architecture again, None for raw pixels. `own_size` is
    the side in pixels of the images that it is made for, whatever size is asked for; None for raw pixels.
    """

    label: str
    backbone: nn.Module
    preprocessing: Preprocessing
    about: dict[str, JSON]
    config: BackboneConfig | None
    own_size: int | None = None

    @property
    def width(self) -> int:
        """How many numbers its features of an image are."""
        of_pixels = 3 * self.preprocessing.size**2
        return self.backbone.embed_dim if isinstance(self.backbone, Backbone) else of_pixels

    @property
    def weights(self) -> str:
        """Where its weights come from, for the user; empty for raw pixels, which have none."""
        sha256 = self.about.get("weights_sha256")
        return f"{self.about.get('weights', '')}" + (f"; SHA-256 {str(sha256)[:16]}" if sha256 else "")


def open_model(config: ModelConfig) -> EvaluatedModel:
    """The backbone that the config names, ready to be measured; ConfigError if it does not take images of the size."""
    model = _model(config)
    preprocessing = replace(model.preprocessing, interpolation=config.interpolation)
    model = replace(model, preprocessing=preprocessing)
    if isinstance(model.backbone, Backbone):
        arguments = "arguments" if config.run is None else None  # a run brings its own
        check_image_sizes(model.backbone, {"size": (model.preprocessing.size,)}, arguments=arguments)
    return model


def _model(config: ModelConfig) -> EvaluatedModel:
    if config.run is not None:
        return _run_model(config, config.run)
    assert config.backbone is not None
    if config.backbone == RAW_PIXELS:
        return raw_pixels(config.size or 224)
    with errors_name_setting(None):
        return _named_model(config, config.backbone)


def _named_model(config: ModelConfig, name: str) -> EvaluatedModel:
    """A network by its timm name, with weights or without."""
    architecture = validate(
        BackboneConfig,
        {
            "name": name,
            "arguments": config.model_dump(mode="json")["arguments"],
            "small_images": config.small_images,
            "weights": config.weights,
            "weights_from": config.weights_from,
        },
    )
    if config.weights is None:
        model = random_initialisation(architecture, _preprocessing(config))
        return replace(model, label=f"{name} at random initialisation", own_size=_own_size(config))
    backbone = create_backbone(architecture)  # refuses weights that do not exist, so it comes first
    about: dict[str, JSON] = {
        "backbone": architecture.model_dump(mode="json"),
        "weights": backbone.origin.text,
        "weights_sha256": backbone.origin.sha256,
    }
    label = f"{name}, {Path(config.weights).name}"
    return EvaluatedModel(label, backbone, _preprocessing(config), about, architecture, _own_size(config))


def _preprocessing(config: ModelConfig) -> Preprocessing:
    """The size, mean and deviation that are given, or those of the weights, or ImageNet's at 224 pixels. For weights,
    prints whose mean and deviation are taken.
    """
    if config.weights is None:
        known = Known()
    else:
        known = known_of(config.weights, name=config.backbone, which=config.weights_from)
    mean = config.mean or _three(known.mean or IMAGENET_MEAN)
    std = config.std or _three(known.std or IMAGENET_STD)
    if config.weights is not None and not (config.mean and config.std):
        of = known.of or f"ImageNet, as those of {config.weights} are not known"
        print(printable(f"{normalised(mean, std, of)}. Set mean and std for other values."), flush=True)
    return Preprocessing(config.size or _own_size(config), mean, std)


def _own_size(config: ModelConfig) -> int:
    """The side of the images that a network is built for, or 224 pixels."""
    built_for = config.arguments.get("img_size", 224)
    if not isinstance(built_for, int) or built_for < 1:
        raise ConfigError(f"arguments.img_size must be a whole number of pixels. Got {built_for!r}.")
    return built_for


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _run_model(config: ModelConfig, run: Path) -> EvaluatedModel:
    """The newest backbone of the run, or the one that is asked for; prints if the run has exported another one."""
    found = load_run(run, which=config.which, step=config.picked_step)
    backbone, preprocessing = found.backbone, found.preprocessing
    of_step = "" if found.step is None else f" of step {found.step}"
    if found.name is None:
        label, weights = "pretrained", f"the run's evaluated backbone{of_step} ({found.path.name})"
    else:
        label = f"{found.name}, step {found.step}"
        weights = f"{found.name} of {found.path.relative_to(run)}"
    exported = exported_step(run)
    if exported is not None and found.step not in (None, exported):
        older = found.step is not None and found.step < exported
        why = f"has an export of step {exported}" if older else f"was trained on after its export, of step {exported}"
        note = f"{run} {why}; step {found.step} is measured"
        print(printable(f"{note} (step={exported} measures the export)."), flush=True)
    own_size = preprocessing.size
    if config.size is not None:
        preprocessing = replace(preprocessing, size=config.size)
    about: dict[str, JSON] = {
        "run": str(run),
        "method": _method_of(run),
        "backbone": backbone.config.model_dump(mode="json"),
        "weights": weights,
        "step": found.step,
        "weights_sha256": found.sha256,
    }
    return EvaluatedModel(label, backbone, preprocessing, about, backbone.config, own_size)


def _method_of(run: Path) -> str | None:
    """What pretrained the run's backbone, as far as its config says."""
    try:
        return str(yaml.safe_load((run / "config.yaml").read_text())["method"]["name"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def baselines_of(model: EvaluatedModel) -> dict[str, EvaluatedModel]:
    """The yardsticks: the pixels themselves, and the same architecture at random initialisation."""
    pixels = raw_pixels(model.preprocessing.size)
    resized = replace(pixels.preprocessing, interpolation=model.preprocessing.interpolation)
    baselines = {RAW_PIXELS: replace(pixels, preprocessing=resized)}
    if model.config is not None:
        baselines["random"] = random_initialisation(model.config, model.preprocessing)
    return baselines


def raw_pixels(size: int) -> EvaluatedModel:
    """Pixels between 0 and 1, not centred, of the image resized to at most 32 x 32."""
    size = min(size, RAW_PIXELS_SIDE)
    images = f"{size} x {size} pixels between 0 and 1, not centred"
    about: dict[str, JSON] = {"backbone": RAW_PIXELS, "images": images}
    preprocessing = Preprocessing(size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return EvaluatedModel("raw pixels", nn.Flatten(), preprocessing, about, None)


def random_initialisation(architecture: BackboneConfig, preprocessing: Preprocessing) -> EvaluatedModel:
    """The architecture as it is before any training, from a fixed seed."""
    architecture = architecture.model_copy(update={"weights": None, "weights_from": None})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        backbone = create_backbone(architecture)
    about: dict[str, JSON] = {
        "backbone": architecture.model_dump(mode="json"),
        "weights": f"random initialisation, seed {RANDOM_SEED}",
    }
    return EvaluatedModel("random initialisation", backbone, preprocessing, about, architecture)
