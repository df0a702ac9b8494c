"""Reconstruction of pixels that an encoder did not see.

MAE (He et al., 2021, https://arxiv.org/abs/2111.06377) and SimMIM (Xie et al., 2021, https://arxiv.org/abs/2111.09886).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.backbones.patches import patchify
from ssl_pipeline.distributed import world_size
from ssl_pipeline.losses.precision import float32


@float32
def mae_loss(images: Tensor, prediction: Tensor, mask: Tensor, *, patch_size: int, normalize_targets: bool) -> Tensor:
    """Mean squared error per pixel, averaged over the removed patches of the whole batch.

    Shapes: images (N, C, H, W), prediction (N, L, p * p * C) in the order of `patchify`, mask (N, L) with 1 = removed.
    With `normalize_targets` each target patch is (patch - mean) / sqrt(variance + 1e-6), the variance unbiased.
    With nothing removed the loss is 0.
    """
    target = patchify(images, patch_size)
    if prediction.shape != target.shape or mask.shape != target.shape[:2]:
        raise ValueError(
            f"mae_loss needs prediction {tuple(target.shape)} and mask {tuple(target.shape[:2])} for these images. "
            f"Got {tuple(prediction.shape)} and {tuple(mask.shape)}."
        )
    error = _patch_errors(target, prediction, normalize_targets)
    mask = mask.to(error.dtype)
    return (error * mask).sum() / mask.sum().clamp(min=1)


@float32
def removed_patches_loss(patches: Tensor, prediction: Tensor, *, normalize_targets: bool) -> Tensor:
    """`mae_loss` of only the removed patches, as many of each image: patches and prediction (N, R, p * p * C)."""
    if prediction.shape != patches.shape:
        raise ValueError(
            f"removed_patches_loss needs prediction {tuple(patches.shape)} for these patches. "
            f"Got {tuple(prediction.shape)}."
        )
    return _patch_errors(patches, prediction, normalize_targets).mean()


@float32
def simmim_loss(images: Tensor, prediction: Tensor, mask: Tensor, *, patch_size: int) -> Tensor:
    """Absolute error per masked pixel and channel, over the whole batch and not image by image.

    Shapes: images and prediction (N, C, H, W), mask (N, L) bool or 0 and 1 over patches of `patch_size`, 1 = masked.

        sum over masked pixels and channels of |image - prediction| / (number of masked pixels + 1e-5) / C

    With several processes of as many masked patches each, the mean over them is the loss of all images. Nothing masked:
    0. Raises ValueError for shapes that do not fit.
    """
    if images.ndim != 4 or prediction.shape != images.shape:
        raise ValueError(
            "simmim_loss needs images and prediction of one shape (N, C, H, W). "
            f"Got {tuple(images.shape)} and {tuple(prediction.shape)}."
        )
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    covered = (rows * patch_size, columns * patch_size)
    if covered != images.shape[2:] or mask.shape != (len(images), rows * columns):
        raise ValueError(
            f"simmim_loss needs sides divisible by {patch_size} and a mask ({len(images)}, {rows} * {columns}). "
            f"Got images {tuple(images.shape)} and mask {tuple(mask.shape)}."
        )
    error = (images - prediction).abs().unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
    error_NL = error.sum(dim=(1, 3, 5)).flatten(1)
    mask = mask.to(error_NL.dtype)
    num_pixels = mask.sum() * patch_size**2
    # the share of this process in the one 1e-5 of the whole batch
    return (error_NL * mask).sum() / (num_pixels + 1e-5 / world_size()) / images.shape[1]


def _patch_errors(target: Tensor, prediction: Tensor, normalize_targets: bool) -> Tensor:
    """(N, L, p * p * C) twice -> (N, L)."""
    if normalize_targets:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=1)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (prediction - target).square().mean(dim=-1)
