"""Networks that can be entered and left at their tokens: one adapter for each class of timm's networks."""

from __future__ import annotations

from timm.layers import HybridEmbed, PatchEmbed
from timm.models import Beit, Eva, SwinTransformer, VisionTransformer
from torch import nn

from ssl_pipeline.backbones.tokens.base import TokenAdapter, Tokens
from ssl_pipeline.backbones.tokens.beit import BeitAdapter
from ssl_pipeline.backbones.tokens.eva import EvaAdapter
from ssl_pipeline.backbones.tokens.flat import FlatAdapter
from ssl_pipeline.backbones.tokens.swin import SwinAdapter
from ssl_pipeline.backbones.tokens.vit import ViTAdapter

__all__ = ["ADAPTERS", "NETWORKS_WITH_TOKENS", "FlatAdapter", "TokenAdapter", "Tokens", "has_tokens"]

ADAPTERS: dict[type[nn.Module], type[TokenAdapter]] = {
    VisionTransformer: ViTAdapter,
    Eva: EvaAdapter,
    Beit: BeitAdapter,
    SwinTransformer: SwinAdapter,
}
NETWORKS_WITH_TOKENS = (
    "timm's VisionTransformer (vit_*, deit_*, vit_*_r_*), Eva (vit_*_dinov3, eva*), Beit (beit*) and SwinTransformer "
    "(swin_*)"
)


def has_tokens(model: nn.Module) -> bool:
    """Whether a timm model has an adapter.

    Subclasses and networks with another patch embedding have forward passes of their own, so they have none; a ViT on
    the stem of a ResNet (vit_*_r_*) differs only in that. An Eva that drops patches by chance (patch_drop_rate)
    loses count of where the others are.
    """
    embeddings = (PatchEmbed, HybridEmbed) if type(model) is VisionTransformer else (PatchEmbed,)
    if type(model) not in ADAPTERS or type(model.patch_embed) not in embeddings:
        return False
    return type(model) is not Eva or model.patch_drop is None
