"""Reconstruction of removed patches (MAE, He et al., 2021, https://arxiv.org/abs/2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.backbones.patches import patchify
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
    """`mae_loss` of removed patches alone, as many of each image: patches and prediction (N, R, p * p * C)."""
    if prediction.shape != patches.shape:
        raise ValueError(
            f"removed_patches_loss needs prediction {tuple(patches.shape)} for these patches. "
            f"Got {tuple(prediction.shape)}."
        )
    return _patch_errors(patches, prediction, normalize_targets).mean()


def _patch_errors(target: Tensor, prediction: Tensor, normalize_targets: bool) -> Tensor:
    """(N, L, p * p * C) twice -> (N, L)."""
    if normalize_targets:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=1)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (prediction - target).square().mean(dim=-1)
