"""How official code initialises the weights of a ViT.

MAE (He et al., 2021, https://arxiv.org/abs/2111.06377), MoCo v3 (Chen et al., 2021, https://arxiv.org/abs/2104.02057)
and BEiT (Bao et al., 2021, https://arxiv.org/abs/2106.08254), which SimMIM follows too.
"""

from __future__ import annotations

from typing import Literal

import torch
from timm.models import Beit, VisionTransformer
from torch import nn

from ssl_pipeline.backbones.positions import sincos_position_embedding
from ssl_pipeline.backbones.tokens.base import TimmModel
from ssl_pipeline.config import ConfigError


@torch.no_grad()
def initialise(model: VisionTransformer | Beit, way: Literal["mae", "moco_v3", "beit"]) -> None:
    """The first weights of linear layers, the patch embedding and the tokens.

    mae, moco_v3: linear layers Xavier-uniform with zero biases, and the patch embedding as one of them over pixels.
        mae: query, key and value weights are one layer; the class token is N(0, 0.02^2).
        moco_v3: they are three layers, so their bound is larger; the class token is N(0, 1e-6^2).
    beit: linear layers, class token and positions N(0, 0.02^2) within one deviation, zero biases; the last weights of
        attention and MLP of block l, from 1, divided by sqrt(2 l). The patch embedding is left to torch.
    """
    if way == "beit":
        _initialise_as_beit(model)
        return
    initialise_as_mae(model)
    patch_embed: nn.Conv2d = model.patch_embed.proj
    nn.init.xavier_uniform_(patch_embed.weight.view(model.embed_dim, -1))
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token, std=0.02 if way == "mae" else 1e-6)
    if way == "moco_v3":
        for name, weight in model.blocks.named_parameters():
            if name.endswith("qkv.weight"):
                for third in weight.chunk(3):
                    nn.init.xavier_uniform_(third)
        if patch_embed.bias is not None:
            nn.init.zeros_(patch_embed.bias)


def _initialise_as_beit(model: TimmModel) -> None:
    initialise_within_a_deviation(model)
    for token in (model.cls_token, model.pos_embed):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
    for number, block in enumerate(model.blocks, start=1):
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight /= (2 * number) ** 0.5


def initialise_within_a_deviation(module: nn.Module, *, std: float = 0.02) -> None:
    """Normal weights cut at one deviation and zero biases for every linear layer inside (BEiT)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std, a=-std, b=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def initialise_as_mae(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer inside."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@torch.no_grad()
def fix_positions(model: VisionTransformer, *, first_half: Literal["column", "row"] = "column") -> None:
    """Put sines into the position table and stop training it; class token and registers have position zero.

    first_half: as in `sincos_position_embedding`.
    """
    positions: nn.Parameter | None = getattr(model, "pos_embed", None)
    if positions is None:
        raise ConfigError("backbone.fixed_positions needs a ViT with a position table, and this one has none.")
    if model.embed_dim % 4:
        raise ConfigError(
            "backbone.fixed_positions needs a ViT whose width is a multiple of 4, for sines and cosines of rows and "
            f"columns. Got {model.embed_dim}; set backbone.arguments.embed_dim, or backbone.fixed_positions=false."
        )
    grid = model.patch_embed.grid_size
    positions.zero_()
    table = sincos_position_embedding(model.embed_dim, grid, class_token=False, first_half=first_half)
    positions[:, -grid[0] * grid[1] :] = table
    positions.requires_grad_(False)
