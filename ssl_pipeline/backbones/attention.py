"""Which way a ViT's attention is computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.layers import use_fused_attn
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


def choose_attention(blocks: Iterable[nn.Module], tokens: Tensor) -> None:
    """Let timm's attention blocks multiply step by step where that is faster than the fused kernel.

    This is so on CPUs in half precision: 1.1x at 197 tokens, 1.3 to 1.8x at 37 to 50, forward and backward of one
    layer; in float32 the fused kernel is up to 1.1x faster.
    """
    fused = use_fused_attn() and not (tokens.device.type == "cpu" and _half_precision(tokens))
    for block in blocks:
        attention = getattr(block, "attn", None)
        if isinstance(attention, Attention):
            # written without a look at what it was, else torch.compile would compile twice
            attention.fused_attn = fused  # type: ignore[misc]


def _half_precision(tokens: Tensor) -> bool:
    half = (torch.bfloat16, torch.float16)
    return tokens.dtype in half or (tokens.dtype == torch.float32 and torch.is_autocast_enabled(tokens.device.type))
