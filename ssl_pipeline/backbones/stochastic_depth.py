"""Stochastic depth by leaving images out (DINOv2, DINOv3): what a branch would add to them is not computed.

With rate r, each branch of each block (attention, MLP) takes a random K = max(int(N * (1 - r)), 1) of the N images of a
pass and adds N / K times its output to them; the others go by. Sources: Huang et al., 2016,
https://arxiv.org/abs/1603.09382; section 5 of Oquab et al., 2023, https://arxiv.org/abs/2304.07193.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_pipeline.config import ConfigError

PER_IMAGE_POSITIONS = 4  # dimensions of rotations (N, heads, L, E) that each image has for itself


def leave_images_out(model: nn.Module, rate: float, name: str) -> None:
    """Let the blocks of a timm model compute each branch for 1 - `rate` of the images in training.

    Raises ConfigError for blocks of another kind than those of timm's VisionTransformer and Eva.
    """
    blocks = list(getattr(model, "blocks", ()))
    if not blocks or any(type(block) not in SUBSET_BLOCKS for block in blocks):
        raise ConfigError(
            "backbone.drop_path_kind=batch_subset works only with the blocks of timm's VisionTransformer (vit_*, "
            f"deit_*) and Eva (vit_*_dinov3, eva02_*). '{name}' has others; take per_image."
        )
    for block in blocks:
        block.__class__ = SUBSET_BLOCKS[type(block)]
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


class SubsetBlock(Block):
    """timm's block of a ViT; its drop paths say how many images each branch leaves out."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        def attend(x: Tensor, chosen: Tensor | None) -> Tensor:
            return self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))

        x = add_to_some(x, attend, self.drop_path1)
        return add_to_some(x, lambda x, chosen: self.ls2(self.mlp(self.norm2(x))), self.drop_path2)


class SubsetEvaBlock(EvaBlock):
    """timm's block of an Eva, whose attention rotates tokens by their place in the image."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        def attend(x: Tensor, chosen: Tensor | None) -> Tensor:
            of_these = rope
            if rope is not None and chosen is not None and rope.ndim == PER_IMAGE_POSITIONS:
                of_these = rope.index_select(0, chosen)
            added = self.attn(self.norm1(x), rope=of_these, attn_mask=attn_mask, is_causal=is_causal)
            return added if self.gamma_1 is None else self.gamma_1 * added

        def mix(x: Tensor, chosen: Tensor | None) -> Tensor:
            added = self.mlp(self.norm2(x))
            return added if self.gamma_2 is None else self.gamma_2 * added

        return add_to_some(add_to_some(x, attend, self.drop_path1), mix, self.drop_path2)


SUBSET_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {Block: SubsetBlock, EvaBlock: SubsetEvaBlock}


def add_to_some(x_NTD: Tensor, branch: Callable[[Tensor, Tensor | None], Tensor], drop_path: nn.Module) -> Tensor:
    """x + branch(x) for a random part of the images, scaled so that the mean over draws is the whole; x for the others.

    branch: is given some images (K, T, D) and their numbers (K,), None for all. drop_path: timm's, for its rate.
    """
    rate = drop_path.drop_prob if isinstance(drop_path, DropPath) and drop_path.training else 0.0
    if not rate:
        return x_NTD + branch(x_NTD, None)
    num_images = len(x_NTD)
    num_kept = max(int(num_images * (1 - rate)), 1)
    kept_K = torch.randperm(num_images, device=x_NTD.device)[:num_kept]
    added_KTD = branch(x_NTD.index_select(0, kept_K), kept_K)
    added_NTD: Tensor = _AddToSome.apply(x_NTD, added_KTD, kept_K, num_images / num_kept)
    return added_NTD


class _AddToSome(torch.autograd.Function):
    """x with `scale` times some rows added; torch's own index_add keeps these rows for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x_NTD: Tensor, added_KTD: Tensor, kept_K: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept_K)
        ctx.scale, ctx.dtype = scale, added_KTD.dtype
        return x_NTD.index_add(0, kept_K, added_KTD.to(x_NTD.dtype), alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient_NTD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (kept_K,) = ctx.saved_tensors
        of_added_KTD = gradient_NTD.index_select(0, kept_K) * ctx.scale
        return gradient_NTD, of_added_KTD.to(ctx.dtype), None, None
