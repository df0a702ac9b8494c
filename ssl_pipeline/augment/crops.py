"""Random crops in the data worker, 8 bits in and out: torchvision's RandomResizedCrop, resized as Pillow does it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ssl_pipeline.augment.views import CROP_TRIES, Uniform, ViewGroup

# V views of each of B images, U uniforms in [0, 1), N tries

Integers = NDArray[np.int64]


def crop_boxes(
    uniforms_VBU: NDArray[np.float64], heights_B: Integers, widths_B: Integers, group: ViewGroup
) -> tuple[Integers, NDArray[np.bool_]]:
    """Where each view is cut out, (V,B,4) as (top, left, height, width), and whether it is flipped, (V,B).

    `random_resized` has the distribution of torchvision's RandomResizedCrop: area uniform in `scale`, aspect
    log-uniform in `aspect`, the first of ten tries that fits into the image at a uniform position; if none fits, the
    largest central crop of an allowed aspect. `pad` boxes are as large as the image and shifted by up to `padding`
    of its size, so they may reach out of it.
    """
    assert uniforms_VBU.shape == (group.count, len(heights_B), group.num_uniforms())
    tops_VB, lefts_VB = uniforms_VBU[..., Uniform.CROP_TOP], uniforms_VBU[..., Uniform.CROP_LEFT]
    if group.crop == "pad":
        shape = uniforms_VBU.shape[:2]
        crop_heights_VB, crop_widths_VB = np.broadcast_to(heights_B, shape), np.broadcast_to(widths_B, shape)
        reach_down_B, reach_right_B = (np.floor(size * group.padding) for size in (heights_B, widths_B))
        tops_VB = np.floor(tops_VB * (2 * reach_down_B + 1)) - reach_down_B
        lefts_VB = np.floor(lefts_VB * (2 * reach_right_B + 1)) - reach_right_B
    else:
        crop_heights_VB, crop_widths_VB, fits_VB = _crop_sizes(uniforms_VBU, heights_B, widths_B, group)
        below_VB, beside_VB = heights_B - crop_heights_VB, widths_B - crop_widths_VB
        tops_VB = np.where(fits_VB, np.floor(tops_VB * (below_VB + 1)), below_VB // 2)
        lefts_VB = np.where(fits_VB, np.floor(lefts_VB * (beside_VB + 1)), beside_VB // 2)
    boxes_VB4 = np.stack((tops_VB, lefts_VB, crop_heights_VB, crop_widths_VB), axis=-1).astype(np.int64)
    flip_prob_V = np.asarray(group.per_view(group.flip_prob))
    return boxes_VB4, uniforms_VBU[..., Uniform.FLIP] < flip_prob_V[:, None]


def _crop_sizes(
    uniforms_VBU: NDArray[np.float64], heights_B: Integers, widths_B: Integers, group: ViewGroup
) -> tuple[Integers, Integers, NDArray[np.bool_]]:
    """Heights and widths of random_resized crops, and whether they come from a try (else from the fallback)."""
    smallest, largest = group.scale
    narrowest, widest = group.aspect
    u_area_VBN = uniforms_VBU[..., Uniform.CROP_AREA : Uniform.CROP_AREA + CROP_TRIES]
    u_aspect_VBN = uniforms_VBU[..., Uniform.CROP_ASPECT : Uniform.CROP_ASPECT + CROP_TRIES]
    area_VBN = (smallest + (largest - smallest) * u_area_VBN) * (heights_B * widths_B)[:, None]
    aspect_VBN = np.exp(np.log(narrowest) + (np.log(widest) - np.log(narrowest)) * u_aspect_VBN)
    tries_VBN2 = np.rint(np.sqrt(np.stack((area_VBN / aspect_VBN, area_VBN * aspect_VBN), axis=-1))).astype(np.int64)
    image_B2 = np.stack((heights_B, widths_B), axis=-1)
    fits_VBN = ((tries_VBN2 > 0) & (tries_VBN2 <= image_B2[:, None])).all(axis=-1)
    first_VB11 = fits_VBN.argmax(axis=-1)[..., None, None]
    first_VB2 = np.take_along_axis(tries_VBN2, first_VB11, axis=2)[:, :, 0]
    # the fallback: whichever side is too long for the allowed aspects is cut
    central_B2 = np.stack(
        (np.minimum(heights_B, np.rint(widths_B / narrowest)), np.minimum(widths_B, np.rint(heights_B * widest))),
        axis=-1,
    )
    fits_VB = fits_VBN.any(axis=-1)
    sizes_VB2 = np.where(fits_VB[..., None], first_VB2, np.maximum(central_B2, 1)).astype(np.int64)
    return sizes_VB2[..., 0], sizes_VB2[..., 1], fits_VB


def crop_and_resize(
    image_HWC: Tensor, box: Sequence[int] | Integers, *, flip: bool, interpolation: str, out: Tensor
) -> None:
    """Write the box of an 8-bit image, resized to out's (3,S,S) and flipped if asked, into `out`.

    The result is Pillow's `image.crop(box).resize((S, S))` within one level (two for one value in a million of a
    photograph). Rows are resampled before columns, as Pillow did up to version 12 and for the official recipes; newer
    ones sometimes begin with the columns, which shows where overshoot at a hard edge is clipped in between.
    Where the box reaches out of the image, the image is reflected without repeating its edge.
    Fastest where `out` is channels-last in memory, as torch's vectorised 8-bit kernel makes it.
    """
    top, left, height, width = (int(number) for number in box)
    size = out.shape[-1]
    crop_CHW = _cut(image_HWC, top, left, height, width)
    if (height, width) != (size, size):
        crop_1CHW = crop_CHW[None].contiguous(memory_format=torch.channels_last)
        crop_CHW = interpolate(crop_1CHW, size=(size, size), mode=interpolation, antialias=True)[0]
    out.copy_(crop_CHW.flip(-1) if flip else crop_CHW)


def _cut(image_HWC: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    image_height, image_width, channels = image_HWC.shape
    if top >= 0 and left >= 0 and top + height <= image_height and left + width <= image_width:
        rows, columns, channel = image_HWC.stride()
        offset = image_HWC.storage_offset() + top * rows + left * columns
        # one call: at 32 pixels slicing twice and permuting costs as much as the resize
        return image_HWC.as_strided((channels, height, width), (channel, rows, columns), offset)
    inner_rows, inner_columns = _reflected(top, height, image_height), _reflected(left, width, image_width)
    return image_HWC.index_select(0, inner_rows).index_select(1, inner_columns).permute(2, 0, 1)


@lru_cache(maxsize=256)  # images of one size have few shifts, and to compute the indices took longer than to use them
def _reflected(start: int, length: int, size: int) -> Tensor:
    """Indices start ... start + length - 1 with those outside [0, size) mirrored at the first and the last."""
    return (size - 1) - ((size - 1) - torch.arange(start, start + length).abs()).abs()
