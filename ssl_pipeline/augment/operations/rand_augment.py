"""RandAugment as FixMatch's strong views have it (Sohn et al., 2020, https://arxiv.org/abs/2001.07685).

The operations are Pillow's, on 8-bit levels that are kept as floats: each gives whole levels to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn.functional import grid_sample

from ssl_pipeline.augment.operations.base import Operation, ViewSettings, per_sample

# V views of each of B images; N: the same images, one view at a time; U uniforms, R rounds, P draws, S pixels

PER_ROUND = 2  # uniforms, and draws: the operation and its magnitude
TRANSLATED, SHEARED, ROTATED, FAINTEST = 0.3, 0.3, math.radians(30), 0.05


class RandOperation(IntEnum):
    """The operations of FixMatch's RandAugment; those of one family follow each other."""

    IDENTITY = 0
    BRIGHTNESS = 1
    COLOUR = 2
    CONTRAST = 3
    SHARPNESS = 4
    ROTATE = 5
    SHEAR_X = 6
    SHEAR_Y = 7
    TRANSLATE_X = 8
    TRANSLATE_Y = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13


RANGES = {
    **dict.fromkeys(RandOperation, (0.0, 0.0)),
    # what is left of the image, the rest is black, gray, mean gray or smooth
    **dict.fromkeys(
        list(RandOperation)[RandOperation.BRIGHTNESS : RandOperation.SHARPNESS + 1], (FAINTEST, 1 - FAINTEST)
    ),
    RandOperation.ROTATE: (-ROTATED, ROTATED),
    **dict.fromkeys((RandOperation.SHEAR_X, RandOperation.SHEAR_Y), (-SHEARED, SHEARED)),
    **dict.fromkeys((RandOperation.TRANSLATE_X, RandOperation.TRANSLATE_Y), (-TRANSLATED, TRANSLATED)),  # of the width
    RandOperation.POSTERIZE: (4.0, 8.0),  # bits that are kept, rounded down
    RandOperation.SOLARIZE: (0.0, 256.0),  # level from which on values are inverted
}
LOWEST, HIGHEST = np.array([RANGES[operation] for operation in RandOperation]).T


class RandAugmentSettings(ViewSettings):
    """How many operations a view goes through.

    Each is one of identity, brightness, colour, contrast, sharpness (all 0.05 to 0.95), rotation (30 degrees to either
    side), shear and translation in x and y (0.3 to either side), posterize (4 to 7 bits), solarize (any threshold),
    autocontrast and equalize, all equally likely, with a magnitude uniform in its range; Pillow's operations on 8-bit
    images, with the nearest pixel and black where the image runs out.
    """

    rand_augment: int = Field(0, ge=0, le=100)
    """Random operations one after the other, each of random magnitude: identity, brightness, colour, contrast,
    sharpness, rotate, shear, translate, posterize, solarize, autocontrast, equalize (FixMatch)."""


class RandAugment(Operation[RandAugmentSettings, int]):
    """As many operations as the setting says. Draws: of each the number of the operation and its magnitude."""

    settings = RandAugmentSettings
    whole_batches = True

    def num_uniforms(self, group: RandAugmentSettings) -> int:
        return PER_ROUND * group.rand_augment

    def num_draws(self, group: RandAugmentSettings) -> int:
        return PER_ROUND * group.rand_augment

    def draw(self, uniforms_VBU: NDArray[np.float64], group: RandAugmentSettings, *, size: int) -> NDArray[np.float32]:
        operation_VBR = (uniforms_VBU[..., 0::PER_ROUND] * len(RandOperation)).astype(np.int64)
        lowest_VBR, highest_VBR = LOWEST[operation_VBR], HIGHEST[operation_VBR]
        magnitude_VBR = lowest_VBR + (highest_VBR - lowest_VBR) * uniforms_VBU[..., 1::PER_ROUND]
        magnitude_VBR = np.where(operation_VBR == RandOperation.POSTERIZE, np.floor(magnitude_VBR), magnitude_VBR)
        drawn_VBR2 = np.stack((operation_VBR, magnitude_VBR), axis=-1)
        return drawn_VBR2.reshape(uniforms_VBU.shape).astype(np.float32)

    def setting(self, group: RandAugmentSettings, view: int, *, size: int) -> int | None:
        return group.rand_augment or None

    def on_cpu(self, image_NCHW: Tensor, draws_NP: Tensor, setting: int) -> Tensor:
        return apply_rounds(image_NCHW.expand(-1, 3, -1, -1), draws_NP, only_due=True)

    def on_accelerator(self, image_NCHW: Tensor, draws_NP: Tensor, setting: int) -> Tensor:
        return apply_rounds(image_NCHW, draws_NP, only_due=False)


def apply_rounds(image_NCHW: Tensor, draws_NP: Tensor, *, only_due: bool) -> Tensor:
    """Images in [0, 1] after operations of each image's own, which round to 8 bits.

    `only_due` computes an operation only for the images that drew it; otherwise all images go through all operations
    and take the result of theirs, so that nothing waits for the device.
    """
    image_NCHW = (image_NCHW * 255).round_()
    for first in range(0, draws_NP.shape[1], PER_ROUND):
        image_NCHW = _one_round(image_NCHW, draws_NP[:, first], draws_NP[:, first + 1], only_due=only_due)
    return image_NCHW.div_(255)


def _one_round(image_NCHW: Tensor, operation_N: Tensor, magnitude_N: Tensor, *, only_due: bool) -> Tensor:
    for start, end, apply in FAMILIES:
        due_N = (operation_N >= start.value) & (operation_N <= end.value)
        if only_due:
            chosen = due_N.nonzero()[:, 0]
            if len(chosen):
                image_NCHW[chosen] = apply(image_NCHW[chosen], operation_N[chosen], magnitude_N[chosen])
        else:
            changed_NCHW = apply(image_NCHW, operation_N, magnitude_N)
            image_NCHW = torch.where(per_sample(due_N), changed_NCHW, image_NCHW)
    return image_NCHW


def _blend(image_NCHW: Tensor, operation_N: Tensor, magnitude_N: Tensor) -> Tensor:
    """Pillow's ImageEnhance: a share of the image, the rest black, gray, mean gray or smoothed."""
    red, green, blue = image_NCHW.split(1, dim=1)
    gray = ((19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768) / 65536).floor_()
    mean = (gray.mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor_()
    target = torch.zeros_like(image_NCHW)
    for operation, its_target in (
        (RandOperation.COLOUR, gray),
        (RandOperation.CONTRAST, mean),
        (RandOperation.SHARPNESS, _smooth(image_NCHW)),
    ):
        target = torch.where(per_sample(operation_N == operation.value), its_target, target)
    return (target + per_sample(magnitude_N) * (image_NCHW - target)).floor_()


def _smooth(image_NCHW: Tensor) -> Tensor:
    """Pillow's SMOOTH filter: weight 5 for the pixel, 1 for each neighbour; the edge stays."""
    if min(image_NCHW.shape[2:]) < 3:
        return image_NCHW
    rows = image_NCHW[:, :, :-2] + image_NCHW[:, :, 1:-1] + image_NCHW[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = image_NCHW.clone()
    inside = smooth[:, :, 1:-1, 1:-1]
    inside.copy_(((total + 4 * inside) / 13).round_())
    return smooth


def _transform(image_NCHW: Tensor, operation_N: Tensor, magnitude_N: Tensor) -> Tensor:
    """Pillow's transforms, nearest pixel and black outside: rotation about the centre, shear about the top left."""
    size = image_NCHW.shape[-1]
    zero_N = torch.zeros_like(magnitude_N)

    def only(operation: RandOperation, values_N: Tensor, otherwise_N: Tensor) -> Tensor:
        return torch.where(operation_N == operation.value, values_N, otherwise_N)

    # where the pixel at (x, y) is taken from, in half images from the centre:
    # (cosine x + x_by_y y + x_shift, y_by_x x + cosine y + y_shift)
    cosine_N = only(RandOperation.ROTATE, magnitude_N.cos(), torch.ones_like(magnitude_N))
    sine_N = only(RandOperation.ROTATE, magnitude_N.sin(), zero_N)
    shear_x_N, shear_y_N = (
        only(operation, magnitude_N, zero_N) for operation in (RandOperation.SHEAR_X, RandOperation.SHEAR_Y)
    )
    x_shift_N = only(RandOperation.TRANSLATE_X, 2 * magnitude_N, shear_x_N)
    y_shift_N = only(RandOperation.TRANSLATE_Y, 2 * magnitude_N, shear_y_N)
    cosine, x_by_y, y_by_x, x_shift, y_shift = (
        values_N[:, None, None] for values_N in (cosine_N, shear_x_N - sine_N, shear_y_N + sine_N, x_shift_N, y_shift_N)
    )
    place_S = (2 * torch.arange(size, device=image_NCHW.device, dtype=torch.float32) + 1) / size - 1
    x, y = place_S[None, None, :], place_S[None, :, None]
    # no matrix product, which TF32 would round
    grid_NHW2 = torch.stack((cosine * x + x_by_y * y + x_shift, y_by_x * x + cosine * y + y_shift), dim=-1)
    return grid_sample(image_NCHW, grid_NHW2, mode="nearest", padding_mode="zeros", align_corners=False)


def _posterize(image_NCHW: Tensor, _: Tensor, bits_N: Tensor) -> Tensor:
    step_N111 = per_sample(torch.exp2(8 - bits_N).round_())
    return ((image_NCHW + 0.5) / step_N111).floor_() * step_N111  # half a level: compiled divisions are approximate


def _solarize(image_NCHW: Tensor, _: Tensor, threshold_N: Tensor) -> Tensor:
    return torch.where(image_NCHW >= per_sample(threshold_N), 255 - image_NCHW, image_NCHW)


def _autocontrast(image_NCHW: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """Each channel stretched from black to white; a channel of one level stays."""
    low, high = (bound(dim=(2, 3), keepdim=True) for bound in (image_NCHW.amin, image_NCHW.amax))
    stretched = (image_NCHW - low) * 255 / (high - low).clamp(min=1)
    stretched = (stretched + 1e-3).floor_()  # compiled divisions are approximate; fractions are 0 or at least 1 / 255
    return torch.where(high > low, stretched, image_NCHW)


def _equalize(image_NCHW: Tensor, _: Tensor, __: Tensor) -> Tensor:
    """Each channel's levels by their rank; as in Pillow, the pixels of the highest level do not count.

    With the step as (pixels - those of the highest level) // 255, level k becomes
    (step // 2 + number of pixels below k) // step, at most 255; with a step of 0 the channel stays.
    """
    level_NCL = image_NCHW.long().flatten(2)
    histogram_NCK = level_NCL.new_zeros(*level_NCL.shape[:2], 256)
    histogram_NCK.scatter_add_(2, level_NCL, torch.ones_like(level_NCL))
    up_to_NCK = histogram_NCK.cumsum(dim=2)
    highest_NC1 = level_NCL.amax(dim=2, keepdim=True)
    step_NC1 = (level_NCL.shape[2] - histogram_NCK.gather(2, highest_NC1)) // 255
    below_NCK = up_to_NCK - histogram_NCK
    table_NCK = ((step_NC1 // 2 + below_NCK) // step_NC1.clamp(min=1)).clamp_(max=255)
    equalized_NCHW = table_NCK.gather(2, level_NCL).view_as(image_NCHW).to(image_NCHW.dtype)
    return torch.where((step_NC1 > 0)[..., None], equalized_NCHW, image_NCHW)


Apply = Callable[[Tensor, Tensor, Tensor], Tensor]  # levels (n,3,H,W), operations (n,), magnitudes (n,) -> levels
FAMILIES: tuple[tuple[RandOperation, RandOperation, Apply], ...] = (
    (RandOperation.BRIGHTNESS, RandOperation.SHARPNESS, _blend),
    (RandOperation.ROTATE, RandOperation.TRANSLATE_Y, _transform),
    (RandOperation.POSTERIZE, RandOperation.POSTERIZE, _posterize),
    (RandOperation.SOLARIZE, RandOperation.SOLARIZE, _solarize),
    (RandOperation.AUTOCONTRAST, RandOperation.AUTOCONTRAST, _autocontrast),
    (RandOperation.EQUALIZE, RandOperation.EQUALIZE, _equalize),
)
