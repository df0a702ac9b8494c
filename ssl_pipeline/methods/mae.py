"""MAE (He et al., 2021, https://arxiv.org/abs/2111.06377)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone, require_tokens
from ssl_pipeline.backbones.patches import patchify, split_by_mask, take_patches, unpatchify
from ssl_pipeline.batch import Batch, MaskRule, RunFacts, Views
from ssl_pipeline.config import Config, ConfigError, Depth, Width
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
    decoder_dim: Width = 512
    """Width of the decoder."""
    decoder_depth: Depth = 8
    """Blocks of the decoder."""
    decoder_heads: Depth = 16
    """Attention heads of the decoder."""

    @model_validator(mode="after")
    def _sizes_fit_together(self) -> MAEConfig:
        step = math.lcm(self.decoder_heads, 4)  # positions are sines and cosines of rows and of columns
        if self.decoder_dim % step:
            raise ValueError(
                f"decoder_dim must be a multiple of 4 and of decoder_heads={self.decoder_heads}. "
                f"Got {self.decoder_dim}; try decoder_dim={max(round(self.decoder_dim / step), 1) * step}."
            )
        return self


class MAE(Method):
    """A ViT that encodes only the kept patches, and a decoder that predicts the pixels of the removed ones.

    The official encoder has `fixed_positions` and `initial_weights: mae`: settings of the backbone.
    """

    config_class = MAEConfig

    def __init__(self, config: MAEConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.encoder = require_tokens(backbone, "MAE", some_patches=True, no_pooling=True)
        self.mask = MaskRule("random", self.encoder.patch_size, ratio=config.mask_ratio)
        self.needs = (Views("image", mask=self.mask),)
        self.decoder = PixelDecoder(
            backbone.embed_dim,
            self.encoder.grid,
            self.encoder.patch_size,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
            num_prefix_tokens=self.encoder.num_prefix_tokens,
        )

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        patches, encoded, removed, restore = self._encode(batch)
        loss = removed_patches_loss(
            take_patches(patches, removed),
            self.decoder(encoded, restore, removed),
            normalize_targets=self.config.normalize_targets,
        )
        features = self.encoder.model.forward_head(encoded.detach(), pre_logits=True)
        return StepOutput(loss, {"feature_std": feature_std(features, progress)})

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All patches (N, L, D), the tokens of the kept ones, where the removed ones are, and the way back."""
        patches = patchify(batch.views["image"].flatten(0, 1), self.encoder.patch_size)
        mask_NL = batch.masks["image"].flatten(0, 1)
        kept, removed, restore = split_by_mask(mask_NL, num_kept=self.mask.num_kept(mask_NL.shape[1]))
        encoded = self.encoder.encode(self.encoder.embed_patches(take_patches(patches, kept), kept), kept)
        return patches, encoded, removed, restore

    def reconstruct(self, batch: Batch) -> Tensor:
        """Patches that are predicted without their mean and deviation are painted with those of the image's own."""
        patches, encoded, _, restore = self._encode(batch)
        painted = self.decoder(encoded, restore).to(patches.dtype)
        if self.config.normalize_targets:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            painted = painted * (variance + 1e-6).sqrt() + mean  # as in the loss
        mask_NL = batch.masks["image"].flatten(0, 1)
        return unpatchify(
            torch.where(mask_NL[..., None], painted, patches), self.encoder.patch_size, grid=self.encoder.grid
        )

    def prepare(self, facts: RunFacts) -> None:
        rows, columns = self.encoder.grid
        needed = rows * self.encoder.patch_size
        for size in facts.view_sizes["image"]:
            if rows != columns or size != needed:
                raise ConfigError(
                    f"augment.image.size must be that of the backbone, {rows} * {self.encoder.patch_size} pixels. "
                    f"Got {size}; try backbone.arguments.img_size={size}."
                )

    def backbones(self) -> dict[str, Backbone]:
        return {"encoder": self.encoder}

    def parts_to_compile(self) -> list[nn.Module]:
        return [*super().parts_to_compile(), self.decoder]
