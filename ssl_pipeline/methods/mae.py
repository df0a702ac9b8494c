"""MAE (He et al., 2021, https://arxiv.org/abs/2111.06377)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ssl_pipeline.backbones import Backbone, TokenBackbone, require_tokens
from ssl_pipeline.backbones.patches import patchify, random_split, take_patches
from ssl_pipeline.batch import Batch
from ssl_pipeline.config import Config, ConfigError
from ssl_pipeline.losses import removed_patches_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.pixel_decoder import PixelDecoder
from ssl_pipeline.schedule import Progress


class MAEConfig(Config):
    """MAE: a ViT sees a quarter of an image's patches, and a small decoder paints the rest."""

    name: Literal["mae"]
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that is removed."""
    normalize_targets: bool = True
    """Whether each patch is predicted with its own mean and deviation taken out."""
    decoder_dim: int = Field(512, gt=0)
    """Width of the decoder."""
    decoder_depth: int = Field(8, ge=1)
    """Blocks of the decoder."""
    decoder_heads: int = Field(16, ge=1)
    """Attention heads of the decoder."""


class MAE(Method):
    """A ViT that encodes the kept patches alone, and a decoder that predicts the pixels of the removed ones.

    The official encoder has `fixed_positions` and `initial_weights: mae`: settings of the backbone.
    """

    view_groups = ("image",)
    backbone: TokenBackbone

    def __init__(self, config: MAEConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = _with_trained_tokens(backbone)
        self.decoder = PixelDecoder(
            backbone.embed_dim,
            self.backbone.grid,
            self.backbone.patch_size,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
            num_prefix_tokens=self.backbone.num_prefix_tokens,
        )

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images = batch.views["image"].flatten(0, 1)
        self.check_view_sizes({"image": images.shape[-1]})
        patches = patchify(images, self.backbone.patch_size)
        noise = torch.rand(patches.shape[:2], device=patches.device)
        kept, removed, restore = random_split(noise, ratio=self.config.mask_ratio)
        encoded = self.backbone.encode(self.backbone.embed_patches(take_patches(patches, kept), kept), kept)
        loss = removed_patches_loss(
            take_patches(patches, removed),
            self.decoder(encoded, restore, removed),
            normalize_targets=self.config.normalize_targets,
        )
        features = self.backbone.model.forward_head(encoded.detach(), pre_logits=True)
        return StepOutput(loss, {"feature_std": feature_std(features)})

    def check_view_sizes(self, sizes: Mapping[str, int]) -> None:
        rows, columns = self.backbone.grid
        size, needed = sizes["image"], rows * self.backbone.patch_size
        if rows != columns or size != needed:
            raise ConfigError(
                f"augment.image.size must be that of the backbone, {rows} * {self.backbone.patch_size} pixels. "
                f"Got {size}; try backbone.arguments.img_size={size}."
            )

    def parts_to_compile(self) -> list[nn.Module]:
        return [*super().parts_to_compile(), self.decoder]


def _with_trained_tokens(backbone: Backbone) -> TokenBackbone:
    """The backbone, if all of it takes part in encoding tokens."""
    with_tokens = require_tokens(backbone, "MAE", some_patches=True)
    after_pooling = [part for part in ("attn_pool", "fc_norm") if _has_weights(getattr(backbone.model, part, None))]
    if after_pooling:
        raise ConfigError(
            f"MAE trains a ViT's tokens, not what follows their pooling. '{backbone.name}' has "
            f"{' and '.join(after_pooling)} there; set backbone.arguments='{{global_pool: avg, fc_norm: false}}'."
        )
    return with_tokens


def _has_weights(part: nn.Module | None) -> bool:
    return part is not None and any(True for _ in part.parameters())
