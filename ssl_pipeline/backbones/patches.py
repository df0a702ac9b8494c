"""Images as rows of patches, and random masks over them (MAE, He et al., 2021, https://arxiv.org/abs/2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor

# Axes: N images, C channels, L patches row by row, p pixels of a patch's side.


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(N, C, rows * p, columns * p) -> (N, L, p * p * C); a patch's pixels in the order row, column, channel."""
    height, width = images.shape[-2:]
    if images.ndim != 4 or height % patch_size or width % patch_size:
        raise ValueError(
            f"patchify needs images (N, C, H, W) with sides divisible by {patch_size}. Got {tuple(images.shape)}."
        )
    patches = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (N, C, rows, p, columns, p)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, *, grid: tuple[int, int] | None = None) -> Tensor:
    """The inverse of `patchify`: (N, L, p * p * C) -> (N, C, H, W), square unless `grid` gives (rows, columns)."""
    rows, columns = grid or (round(patches.shape[1] ** 0.5),) * 2
    if patches.ndim != 3 or rows * columns != patches.shape[1] or patches.shape[2] % patch_size**2:
        raise ValueError(
            f"unpatchify needs (N, {rows} * {columns}, {patch_size} * {patch_size} * C). Got {tuple(patches.shape)}."
        )
    pixels = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (rows, columns))
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def random_masking(noise: Tensor, *, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keep, of each image, the int(L * (1 - ratio)) patches with the smallest noise.

    noise: (N, L), one draw per patch. Returns, with K kept patches,

        kept     (N, K) indices of the kept patches, by ascending noise
        mask     (N, L) float32, 1 = removed, 0 = kept
        restore  (N, L): row r of [kept patches, removed patches] gathered at restore[r] is in image order again
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"a masking ratio must be at least 0 and below 1. Got {ratio}.")
    num_kept = int(noise.shape[1] * (1 - ratio))
    order = torch.argsort(noise, dim=1, stable=True)
    restore = torch.argsort(order, dim=1)
    return order[:, :num_kept], (restore >= num_kept).float(), restore


def split_by_mask(mask_NL: Tensor, *, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the kept and the masked patches of each image are; every image has the same number of them.

    mask_NL: bool, True = masked, with `num_kept` False in each row: a number that the host knows, so that nothing waits
    for the device. Returns, each in image order,

        kept     (N, K) indices of the kept patches
        masked   (N, L - K) indices of the masked ones
        restore  (N, L): row r of [kept patches, masked patches] gathered at restore[r] is in image order again
    """
    order = torch.argsort(mask_NL.byte(), dim=1, stable=True)
    return order[:, :num_kept], order[:, num_kept:], torch.argsort(order, dim=1)


def take_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """(N, L, D) and indices (N, K) of patches of each image -> (N, K, D)."""
    return patches.gather(1, indices[:, :, None].expand(-1, -1, patches.shape[2]))
