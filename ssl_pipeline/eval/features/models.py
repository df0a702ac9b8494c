"""What an evaluator measures: a run's backbone, a timm model, or the two baselines that need no pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import timm
import torch
import yaml
from pydantic import Field, model_validator
from torch import nn

from ssl_pipeline.augment.operations.base import Deviation, Mean
from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, load_backbone
from ssl_pipeline.config import Config, validate
from ssl_pipeline.eval.features.checkpoints import load_from_checkpoint
from ssl_pipeline.files import JSON, sha256_of

RAW_PIXELS = "raw_pixels"
RAW_PIXELS_SIDE = 32
RANDOM_SEED = 0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ModelConfig(Config):
    """The backbone to measure: a run's, or a timm model."""

    run: Path | None = None
    """A run's directory: what it exported (backbone.safetensors) is measured, before its end the newest checkpoint."""
    which: str | None = None
    """With `run`: a backbone of its checkpoints by name, `student` or `teacher`, instead of the one it exports."""
    checkpoint: Annotated[int, Field(gt=0)] | None = None
    """With `run`: the step of one of its checkpoints, instead of the newest."""
    backbone: str | None = None
    """Instead of a run: a timm model by name, or `raw_pixels`."""
    arguments: dict[str, bool | int | float | str] = Field(default={})
    """With `backbone`: the model's arguments, `arguments.img_size=32`."""
    small_images: bool = False
    """With `backbone`: a CNN's 3x3 stem without max-pool."""
    weights: str | None = None
    """With `backbone`: a weights file or a timm pretrained tag; without it the model is at random initialisation."""
    size: Annotated[int, Field(gt=0, le=8192)] | None = None
    """Side of the images in pixels; by default the run's evaluation size, or 224."""
    mean: Mean | None = None
    """With `backbone`: mean of the colour channels; by default the pretrained tag's, or ImageNet's."""
    std: Deviation | None = None
    """With `backbone`: standard deviation of the colour channels; by default as `mean`."""

    @model_validator(mode="after")
    def _one_model(self) -> ModelConfig:
        if (self.run is None) == (self.backbone is None):
            raise ValueError("Give either run=DIR or backbone=NAME.")
        given = [name for name in ("arguments", "small_images", "weights", "mean", "std") if getattr(self, name)]
        if self.run is not None and given:
            raise ValueError(f"{given[0]} belongs to backbone=NAME. run=DIR brings its own.")
        of_run = [name for name in ("which", "checkpoint") if getattr(self, name)]
        if self.backbone is not None and of_run:
            raise ValueError(f"{of_run[0]} belongs to run=DIR. backbone=NAME is a single network.")
        return self


@dataclass(frozen=True)
class EvaluatedModel:
    """A frozen network with what its images need.

    `about` is JSON that tells it from any other one; `config` builds the same architecture anew, None for raw pixels.
    """

    label: str
    backbone: nn.Module
    preprocessing: Preprocessing
    about: dict[str, JSON]
    config: BackboneConfig | None


def open_model(config: ModelConfig) -> EvaluatedModel:
    """The backbone that the config names, ready to be measured."""
    if config.run is not None:
        return _run_model(config, config.run)
    assert config.backbone is not None
    if config.backbone == RAW_PIXELS:
        return raw_pixels(config.size or 224)
    architecture = validate(
        BackboneConfig,
        {
            "name": config.backbone,
            "arguments": dict(config.arguments),
            "small_images": config.small_images,
            "weights": config.weights,
        },
    )
    if config.weights is None:
        model = random_initialisation(architecture, _preprocessing(config))
        return replace(model, label=f"{config.backbone} at random initialisation")
    backbone = create_backbone(architecture)  # refuses weights that do not exist, so it comes first
    about: dict[str, JSON] = {"backbone": architecture.model_dump(mode="json"), "weights": config.weights}
    if Path(config.weights).is_file():
        about["weights_sha256"] = sha256_of(Path(config.weights))
    return EvaluatedModel(config.backbone, backbone, _preprocessing(config), about, architecture)


def _preprocessing(config: ModelConfig) -> Preprocessing:
    """The size, mean and deviation that are given, else those of the pretrained tag, else ImageNet's at 224 pixels."""
    published = None
    if config.weights is not None and not Path(config.weights).is_file():
        published = timm.get_pretrained_cfg(f"{str(config.backbone).split('.')[0]}.{config.weights}")
    mean, std = (published.mean, published.std) if published else (IMAGENET_MEAN, IMAGENET_STD)
    return Preprocessing(config.size or 224, config.mean or _three(mean), config.std or _three(std))


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _run_model(config: ModelConfig, run: Path) -> EvaluatedModel:
    """What the run exported; or from its checkpoints, if that is asked for or the run has not ended."""
    file = run / "backbone.safetensors"
    if config.which is None and config.checkpoint is None and file.is_file():
        backbone, preprocessing = load_backbone(run)
        label, sha256 = "pretrained", sha256_of(file)
        weights = "the run's evaluated backbone (backbone.safetensors)"
    else:
        found = load_from_checkpoint(run, which=config.which, step=config.checkpoint)
        backbone, preprocessing = found.backbone, found.preprocessing
        label, sha256 = f"{found.name}, step {found.step}", found.sha256
        weights = f"{found.name} of {found.path.relative_to(run)}"
    if config.size is not None:
        preprocessing = replace(preprocessing, size=config.size)
    about: dict[str, JSON] = {
        "run": str(run),
        "method": _method_of(run),
        "backbone": backbone.config.model_dump(mode="json"),
        "weights": weights,
        "weights_sha256": sha256,
    }
    return EvaluatedModel(label, backbone, preprocessing, about, backbone.config)


def _method_of(run: Path) -> str | None:
    """What pretrained the run's backbone, as far as its config says."""
    try:
        return str(yaml.safe_load((run / "config.yaml").read_text())["method"]["name"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def baselines_of(model: EvaluatedModel) -> dict[str, EvaluatedModel]:
    """The yardsticks: the pixels themselves, and the same architecture at random initialisation."""
    baselines = {RAW_PIXELS: raw_pixels(model.preprocessing.size)}
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
    architecture = architecture.model_copy(update={"weights": None})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)
        backbone = create_backbone(architecture)
    about: dict[str, JSON] = {
        "backbone": architecture.model_dump(mode="json"),
        "weights": f"random initialisation, seed {RANDOM_SEED}",
    }
    return EvaluatedModel("random initialisation", backbone, preprocessing, about, architecture)
