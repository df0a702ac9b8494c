"""What a recipe may say of a backbone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ssl_pipeline.config import Config, MayChange, PlaceText

RESERVED_ARGUMENTS = {
    "num_classes": "the head is always left out",
    "pretrained": "set backbone.weights",
    "checkpoint_path": "set backbone.weights",
    "drop_path_rate": "set backbone.drop_path",
    "dynamic_img_size": "it is always on where the model has it",
}
ARCHITECTURE = ("name", "arguments", "small_images")  # what shapes the tensors; the rest is how they begin and train


class BackboneConfig(Config):
    name: str
    """Name of a timm model, for instance resnet18 or vit_small_patch16_224."""
    arguments: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further arguments of the timm model, for instance {img_size: 32, patch_size: 4}."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Stochastic depth rate of the last block."""
    small_images: bool = False
    """ResNets only: a 3x3 stem of stride 1 and no max-pool, for images of about 32 pixels."""
    weights: PlaceText | None = None
    """Weights to start from: a file (.safetensors, .pth, .pt) or the tag of a pretrained timm model."""
    initial_weights: Literal["mae", "moco_v3"] | None = None
    """ViTs only: how the weights begin, as in the official code of MAE or MoCo v3; null leaves it to timm."""
    fixed_positions: bool = False
    """ViTs only: a table of sines that is not trained, instead of learnt positions: MAE's, and MoCo v3's with its
    initial_weights."""
    frozen_patch_embed: bool = False
    """ViTs only: whether the patch embedding stays as it begins (MoCo v3)."""
    checkpoint_activations: MayChange[bool] = False
    """Whether the backward pass computes the blocks again instead of keeping what they computed: the same results in a
    fraction of the memory, about a quarter slower. Not for networks with batch norm."""

    @model_validator(mode="after")
    def _arguments_are_the_models_own(self) -> BackboneConfig:
        for argument, reason in RESERVED_ARGUMENTS.items():
            if argument in self.arguments:
                raise ValueError(f"backbone.arguments must not hold '{argument}': {reason}.")
        if self.weights and self.initial_weights:
            raise ValueError(
                "backbone.weights and initial_weights both say how the weights begin. Leave one of them out."
            )
        return self
