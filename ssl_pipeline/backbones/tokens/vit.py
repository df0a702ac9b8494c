"""timm's VisionTransformer: the ViTs of DINO, DINOv2, MAE, MoCo v3, DeiT, CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn

from ssl_pipeline.backbones.attention import choose_attention
from ssl_pipeline.backbones.positions import Grid
from ssl_pipeline.backbones.reversible import is_reversible, through_two_streams
from ssl_pipeline.backbones.tokens.flat import FlatAdapter


class ViTAdapter(FlatAdapter):
    """The position table is resampled as official code does, which timm's forward does not; see `is_antialiased`."""

    def prepare(self, tokens_NTD: Tensor) -> Tensor:
        model = self.model
        return model.norm_pre(model.patch_drop(model.pos_drop(tokens_NTD)))

    def block_arguments(self, grid: Grid, places_NK: Tensor | None) -> Sequence[Mapping[str, Tensor | None]]:
        return [{}] * self.num_blocks

    def blocks(
        self, tokens_NTD: Tensor, arguments: Sequence[Mapping[str, Tensor | None]], layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if is_reversible(self.model):
            return through_two_streams(self.model.blocks, tokens_NTD, layers)
        choose_attention(self.model.blocks, tokens_NTD)
        if layers:
            return super().blocks(tokens_NTD, arguments, layers)
        if self.model.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.model.blocks, tokens_NTD), {}
        return self.model.blocks(tokens_NTD), {}

    def parts_to_compile(self) -> list[nn.Module]:
        return [] if is_reversible(self.model) else [self.model.blocks]
