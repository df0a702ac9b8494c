"""SimMIM (Xie et al., 2021, https://arxiv.org/abs/2111.09886)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone, Tokens, require_tokens
from ssl_pipeline.backbones.patches import patchify, unpatchify
from ssl_pipeline.batch import Batch, MaskRule, RunFacts, Views
from ssl_pipeline.config import Config, ConfigError
from ssl_pipeline.losses import simmim_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.heads import PixelShuffleDecoder
from ssl_pipeline.optim.rules import ParamRule, untouched_by_decay
from ssl_pipeline.schedule import Progress


class SimMIMConfig(Config):
    """SimMIM: an encoder sees an image with large squares masked, and one layer paints them."""

    name: Literal["simmim"]
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    """Share of the squares that is masked, rounded up to whole squares."""
    mask_size: int = Field(32, gt=0)
    """Side of a masked square in pixels (MASK_PATCH_SIZE): a multiple of the backbone's patch."""


class SimMIM(Method):
    """An encoder whose masked patches are a learnt token, and a linear layer from its tokens to pixels.

    ViTs and Swins; the encoder sees all patches. The official ViT has `initial_weights: beit`.
    """

    config_class = SimMIMConfig
    reads_class_token = False

    def __init__(self, config: SimMIMConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.encoder = require_tokens(backbone, "SimMIM", no_pooling=True)
        unit, rest = divmod(config.mask_size, self.encoder.patch_size)
        if rest:
            raise ConfigError(
                f"method.mask_size must be a multiple of the backbone's patch size {self.encoder.patch_size}. "
                f"Got {config.mask_size}; try {max(unit, 1) * self.encoder.patch_size}."
            )
        self.needs = (
            Views("image", mask=MaskRule("units", self.encoder.patch_size, ratio=config.mask_ratio, unit=unit)),
        )
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.encoder.patch_dim))  # decayed, as no vector is
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.decoder = PixelShuffleDecoder(backbone.embed_dim, self.encoder.stride)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images, mask_NL, tokens = self._encode(batch)
        loss = simmim_loss(images, self.decoder(tokens.patch_map()), mask_NL, patch_size=self.encoder.patch_size)
        return StepOutput(loss, {"feature_std": feature_std(self.encoder.pool(tokens).detach(), progress)})

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tokens]:
        """The images (N, 3, H, W), their masks (N, L), and the tokens of what is not masked."""
        images, mask_NL = batch.views["image"].flatten(0, 1), batch.masks["image"].flatten(0, 1)
        return images, mask_NL, self.encoder.tokens(images, mask=mask_NL, mask_token=self.mask_token)

    def reconstruct(self, batch: Batch) -> Tensor:
        images, mask_NL, tokens = self._encode(batch)
        size = self.encoder.patch_size
        grid = (images.shape[-2] // size, images.shape[-1] // size)
        painted, own = (patchify(x, size) for x in (self.decoder(tokens.patch_map()).to(images.dtype), images))
        return unpatchify(torch.where(mask_NL[..., None], painted, own), size, grid=grid)

    def prepare(self, facts: RunFacts) -> None:
        for size in facts.view_sizes["image"]:
            for side, whose in ((self.config.mask_size, "method.mask_size"), (self.encoder.stride, "a token's pixels")):
                if size % side:
                    raise ConfigError(
                        f"augment.image.size must be a multiple of {whose}, {side}. "
                        f"Got {size}; try {max(round(size / side), 1) * side}."
                    )
            self.encoder.require_size(size, group="image")

    def backbones(self) -> dict[str, Backbone]:
        return {"encoder": self.encoder}

    def param_rules(self) -> tuple[ParamRule, ...]:
        if self.encoder.stride == self.encoder.patch_size:
            return untouched_by_decay(self, "encoder.")
        # the official Swin also spares the mask token and the biases by position, which have two dimensions
        names = [name for name, _ in self.encoder.named_parameters() if name.endswith("relative_position_bias_table")]
        return tuple(ParamRule(name, decays=False) for name in ("mask_token", *(f"encoder.{name}" for name in names)))
