"""MAE's decoder: from the tokens of some patches to the pixels of the others (He et al., 2021)."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm  # eps 1e-6, as the official code
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_pipeline.backbones.attention import choose_attention
from ssl_pipeline.backbones.initialisation import initialise_as_mae
from ssl_pipeline.backbones.patches import take_patches
from ssl_pipeline.backbones.positions import Grid, sincos_position_embedding


class PixelDecoder(nn.Module):
    """MAE's decoder: puts a mask token wherever a patch was removed and predicts the pixels of patches.

    Encoded tokens (N, num_prefix_tokens + K, in_dim) of the K kept patches and restore (N, L) of `split_by_mask`
    -> (N, L, p * p * channels) in the order of `patchify`; with the indices `wanted` (N, R) of patches, only of these.
    """

    positions: Tensor

    def __init__(
        self,
        in_dim: int,
        grid: Grid,
        patch_size: int,
        *,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        channels: int = 3,
        num_prefix_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        positions = sincos_position_embedding(dim, grid, class_token=False)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(
            *[Block(dim, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)]
        )
        self.norm = LayerNorm(dim)
        self.predict = nn.Linear(dim, patch_size**2 * channels)
        initialise_as_mae(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, restore: Tensor, wanted: Tensor | None = None) -> Tensor:
        tokens = self.embed(encoded)
        prefix, kept = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        num_images, num_kept = kept.shape[:2]
        mask_tokens = self.mask_token.to(kept.dtype).expand(num_images, restore.shape[1] - num_kept, -1)
        patches = take_patches(torch.cat([kept, mask_tokens], dim=1), restore)
        # the prefix tokens have position zero
        tokens = torch.cat([prefix, patches + self.positions], dim=1)
        choose_attention(self.blocks, tokens)
        decoded = self.blocks(tokens)[:, self.num_prefix_tokens :]
        return self.predict(self.norm(decoded if wanted is None else take_patches(decoded, wanted)))
