"""The settings of a backbone in a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import timm
from pydantic import Field, ValidationInfo, field_validator, model_validator
from timm.models import is_model_in_modules

from ssl_pipeline.backbones.weights import without_hub, without_name
from ssl_pipeline.config import Config, ConfigError, MayChange, PlaceText

RESERVED_ARGUMENTS = {
    "num_classes": "the head is always left out",
    "pretrained": "set backbone.weights",
    "checkpoint_path": "set backbone.weights",
    "drop_path_rate": "set backbone.drop_path",
    "dynamic_img_size": "it is always on where the model has it",
    "features_only": "a backbone gives one vector of features for an image",
    "out_indices": "a backbone gives one vector of features for an image",
    "pretrained_cfg": "set backbone.weights",
    "pretrained_cfg_overlay": "set backbone.weights",
    "pretrained_strict": "weights must fill every tensor",
    "cache_dir": "set the environment variable HF_HOME",
    "scriptable": "a backbone is trained and evaluated as it is",
    "exportable": "a backbone is trained and evaluated as it is",
}
SIZES = {"depth", "depths", "dims", "embed_dim", "img_size", "layers", "num_heads", "patch_size", "window_size"}
"""Arguments that count something and must be at least 1."""
Argument = bool | int | float | str | list[bool | int | float | str]
"""Values of a timm model's arguments: a value, or a list of values (the depths of a Swin's stages)."""
ARCHITECTURE = ("name", "arguments", "small_images", "reversible", "class_tokens", "patch_mean")
"""Keys that decide the tensors' shapes and what is computed; the others are about initial weights and training."""
CAME_LATER = {"reversible", "class_tokens", "patch_mean"}
"""Keys that older files lack."""


class BackboneConfig(Config):
    """A network of timm's: its architecture, the weights that it begins with, and what of it is trained."""

    name: str
    """Name of a timm model, for instance resnet18 or vit_small_patch16_224."""
    arguments: dict[str, Argument] = Field(default_factory=dict)
    """Further arguments of the timm model, for instance {img_size: 32, patch_size: 4}; lists too, depths=[2,2,6,2]."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Stochastic depth rate: of the last block, or of all with drop_path_kind=batch_subset."""
    drop_path_kind: Literal["per_image", "batch_subset"] = "per_image"
    """per_image: each image draws for itself whether a branch is added to it, at rates that grow to drop_path from
    block to block (timm's). batch_subset: each branch leaves out that share of the images of a pass, the same in all
    blocks, and is not computed for them, so that a rate of 0.3 saves nearly that of the time (DINOv2 and DINOv3)."""
    small_images: bool = False
    """ResNets only: a 3x3 stem of stride 1 and no max-pool, for images of about 32 pixels."""
    weights: MayChange[PlaceText | None] = None  # to another place of the same bytes: `resume` looks at these
    """Weights to start from: a file (.safetensors, .pth, .pt), a run's directory or that of one of its checkpoints, or
    the tag of a pretrained timm model, with or without the model's name before it."""
    weights_from: str | None = None
    """Which network of the weights: `teacher` or `student` of a file, a backbone of a run by name; by default the one
    that is usually evaluated."""
    initial_weights: Literal["mae", "moco_v3", "beit"] | None = None
    """ViTs only: how the weights are initialised, as in the official code of MAE, MoCo v3 or BEiT (SimMIM's too); null
    leaves it to timm."""
    fixed_positions: bool = False
    """ViTs only: a fixed table of sines instead of learnt positions: MAE's, and MoCo v3's with its
    initial_weights."""
    frozen_patch_embed: bool = False
    """ViTs only: whether the patch embedding stays as initialised (MoCo v3)."""
    frozen_batch_norm: bool = False
    """Whether batch norm keeps the statistics of the weights. Replacing them by those of a few hundred augmented images
    costs a good network more than training on few images gains."""
    reversible: bool = False
    """ViTs of timm's VisionTransformer only: two streams of tokens, so that the backward pass computes activations from
    outputs (Mangalam et al., 2022), in memory that does not grow with depth. It computes another function of the same
    parameters, so released weights do not fit."""
    class_tokens: int = Field(default=0, ge=0, le=1000)
    """ViTs only: the features are the class tokens of the last N blocks, each after the final norm, concatenated,
    instead of the network's own (DINO's linear evaluation: 4 of a ViT-S, 1 of a ViT-B); 0: its own."""
    patch_mean: bool = False
    """With class_tokens: whether the mean of the last block's patches is appended to them (DINO's ViT-B)."""
    checkpoint_activations: MayChange[bool] = False
    """Whether the backward pass recomputes the blocks instead of keeping their activations: the same results in a
    fraction of the memory, about a quarter slower. Not for networks with batch norm."""

    @classmethod
    def of_name(cls, name: str) -> tuple[str, ...]:
        """All but `small_images` where the new network is a ResNet: that is about the images."""
        keeps_stem = timm.is_model(name) and is_model_in_modules(name, ["resnet"])
        return tuple(key for key in cls.model_fields if key != "small_images" or not keeps_stem)

    @field_validator("weights")
    @classmethod
    def _tag_alone(cls, weights: str | None, info: ValidationInfo) -> str | None:
        return None if weights is None else without_name(weights, str(info.data.get("name")))

    @model_validator(mode="after")
    def _arguments_are_the_models_own(self) -> BackboneConfig:
        architecture, _, tag = without_hub(self.name).partition(".")
        if architecture != self.name and not tag:
            raise ValueError(
                "backbone.name must be a timm architecture without its location. "
                f"Got '{self.name}'; write backbone.name={architecture}"
            )
        if tag:
            raise ValueError(
                f"backbone.name must be an architecture without a tag of pretrained weights. Got '{self.name}'; write "
                f"backbone.name={architecture} backbone.weights={tag}"
            )
        for argument, reason in RESERVED_ARGUMENTS.items():
            if argument in self.arguments:
                raise ValueError(f"backbone.arguments must not hold '{argument}': {reason}.")
        for argument in SIZES & self.arguments.keys():
            given = self.arguments[argument]
            if any(isinstance(size, int) and size < 1 for size in (given if isinstance(given, list) else [given])):
                raise ValueError(f"backbone.arguments.{argument} must be at least 1. Got {given}.")
        if self.arguments.get("in_chans", 3) != 3:
            raise ValueError(
                f"backbone.arguments.in_chans must be 3, the channels of every image here (gray ones are made RGB). "
                f"Got {self.arguments['in_chans']}; leave it out."
            )
        pool = self.arguments.get("global_pool", "avg")
        if not pool or "cat" in str(pool):
            raise ValueError(
                "backbone.arguments.global_pool must give one vector of the network's width for an image. "
                f"Got '{pool}'; leave it out, or try avg (ViTs: token or avg)."
            )
        if self.weights_from and not self.weights:
            raise ValueError(
                f"backbone.weights_from={self.weights_from} chooses a network of backbone.weights. Set both."
            )
        if self.weights and self.initial_weights:
            raise ValueError(
                "backbone.weights and initial_weights both set the initial weights. Leave one of them out."
            )
        if self.reversible and self.checkpoint_activations:
            raise ValueError(
                "backbone.reversible and checkpoint_activations both save activation memory. Leave one out."
            )
        if self.reversible and self.drop_path_kind == "batch_subset":
            raise ValueError(
                "backbone.reversible takes stochastic depth by image. Set backbone.drop_path_kind=per_image."
            )
        if self.patch_mean and not self.class_tokens:
            raise ValueError("backbone.patch_mean needs class tokens. Set backbone.class_tokens too.")
        if self.frozen_batch_norm and not self.weights:
            raise ValueError("backbone.frozen_batch_norm keeps the statistics of weights. Set backbone.weights too.")
        return self


def architecture_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """What of a backbone's description in a file is ARCHITECTURE; KeyError for an entry that is missing.

    Runs of 0.2.0 and before may have the name with a tag that changed nothing.
    """
    architecture = {key: description[key] for key in ARCHITECTURE if key not in CAME_LATER or key in description}
    return architecture | {"name": str(architecture["name"]).partition(".")[0]}


KEYS = re.compile(rf"(?<![\w./-])backbone\.({'|'.join(BackboneConfig.model_fields)})\b")


@contextmanager
def errors_name_setting(section: str | None) -> Iterator[None]:
    """Errors in the block name the keys of a network that is set outside of `backbone`.

    section: where it is set (method.teacher); None for an evaluator's, whose keys are backbone, weights and so on.
    """

    def here(found: re.Match[str]) -> str:
        if section is not None:
            return f"{section}.{found[1]}"
        return "backbone" if found[1] == "name" else found[1]

    try:
        yield
    except ConfigError as error:
        raise ConfigError(KEYS.sub(here, str(error))) from None
