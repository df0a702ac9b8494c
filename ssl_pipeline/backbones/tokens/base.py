"""The tokens of a network, and what an adapter of timm's networks offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import HybridEmbed, PatchEmbed
from torch import Tensor, nn

from ssl_pipeline.backbones.positions import Grid

TimmModel = Any
"""A timm network, whose attributes have no static types."""

# Axes: N images, R rows and C columns of patches, L = R * C patches row by row, D dimensions.


@dataclass(frozen=True)
class Tokens:
    """What a network makes of N images, after its final norm."""

    cls: Tensor | None
    """(N, D); None where the network has no class token."""
    registers: Tensor
    """(N, number of registers, D); most networks have 0."""
    patches: Tensor
    """(N, L, D), row by row."""
    grid: Grid
    """Rows and columns of patches: L = rows * columns."""
    layers: tuple[Tokens, ...] = ()
    """The tokens of inner blocks, in the order in which they were asked for."""

    def patch_map(self) -> Tensor:
        """The patches as (N, D, rows, columns)."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


class TokenAdapter(ABC):
    """How the networks of one class of timm are entered and left at their tokens."""

    patch_size: int
    """Side in pixels of the patches that are embedded and masked."""
    patch_dim: int
    """Width of an embedded patch, and so of a mask token."""
    grid: Grid
    """Rows and columns of these patches in an image of the network's own size."""
    stride: int
    """Side in pixels of what an encoded patch stands for."""
    num_blocks: int
    num_prefix_tokens: int
    """Class token and registers together."""
    takes_some_patches: bool
    """Whether the network can encode only some of an image's patches."""
    compiles_for_any_size: ClassVar[bool] = True
    """Whether torch.compile can make one program for images of several sizes, fast enough to be worth it."""

    def __init__(self, model: TimmModel) -> None:
        self.model = model

    @abstractmethod
    def patches(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> embedded patches (N, R, C, patch_dim), before their positions."""

    @abstractmethod
    def encode(self, patches_NRCD: Tensor, layers: Sequence[int]) -> Tokens:
        """Embedded patches -> tokens after the final norm; those of the blocks `layers` too."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Images -> features (N, embed_dim), as the network's own forward."""

    @abstractmethod
    def pool(self, tokens: Tokens) -> Tensor:
        """The features (N, embed_dim) of an image with these tokens."""

    @abstractmethod
    def parts_to_compile(self) -> list[nn.Module]:
        """The parts of the network that take most of the time."""


def embed_whole(patch_embed: PatchEmbed | HybridEmbed, images: Tensor) -> Tensor:
    """Images (N, 3, H, W) -> (N, R, C, D); raises ValueError for sides that the network does not take."""
    check_sides(patch_embed, images.shape[-2], images.shape[-1])
    patches = patch_embed(images)
    return patches if patches.ndim == 4 else patches.unflatten(1, patch_embed.grid_size)


def patch_side(patch_embed: PatchEmbed | HybridEmbed) -> int:
    """Side in pixels of what becomes one token: of a patch of the image, or of a patch of a CNN's map."""
    side = patch_embed.feat_ratio()
    assert isinstance(side, int)
    return side


def check_sides(patch_embed: PatchEmbed | HybridEmbed, height: int, width: int) -> None:
    """Raises ValueError if the network does not take images of this height and width in pixels."""
    if patch_embed.strict_img_size and (height, width) != patch_embed.img_size:
        own = "x".join(map(str, patch_embed.img_size or ()))
        raise ValueError(f"this network takes only images of its own size, {own}. Got {height}x{width}.")
    patch_size = patch_side(patch_embed)
    if (height % patch_size or width % patch_size) and not patch_embed.dynamic_img_pad:
        raise ValueError(f"image sides must be multiples of the patch size {patch_size}. Got {height}x{width}.")


def replace_masked(patches_NRCD: Tensor, mask_NL: Tensor, mask_token: Tensor) -> Tensor:
    """Embedded patches with `mask_token` (D values) wherever `mask_NL` is True.

    The token takes part whatever the mask, so that it has a gradient in every step.
    """
    num_images, rows, columns, dim = patches_NRCD.shape
    if mask_NL.dtype != torch.bool or mask_NL.shape != (num_images, rows * columns):
        raise ValueError(
            f"mask must be bool ({num_images}, {rows} * {columns}), True where a patch is masked. "
            f"Got {mask_NL.dtype} {tuple(mask_NL.shape)}."
        )
    if mask_token.numel() != dim:
        raise ValueError(f"mask_token must have the {dim} values of a patch. Got {tuple(mask_token.shape)}.")
    token = mask_token.reshape(dim).to(patches_NRCD.dtype)
    return torch.where(mask_NL.unflatten(1, (rows, columns))[..., None], token, patches_NRCD)
