"""Random crops in the data worker, 8 bits in and out: torchvision's RandomResizedCrop, resized as Pillow does it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

# V views of each of B images, U uniforms in [0, 1), N tries

Integers = NDArray[np.int64]


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


def crop_images(
    images: Sequence[Tensor],
    boxes_VB4: Integers,
    flips_VB: NDArray[np.bool_],
    *,
    interpolation: str,
    out: Tensor,
) -> None:
    """Every view of some 8-bit images (H,W,3) into `out` (V,B,S,S,3)."""
    boxes, flips, out_VBCHW = boxes_VB4.tolist(), flips_VB.tolist(), out.movedim(-1, 2)
    for number, image in enumerate(images):
        for view, (its_boxes, its_flips) in enumerate(zip(boxes, flips, strict=True)):
            crop_and_resize(
                image,
                its_boxes[number],
                flip=its_flips[number],
                interpolation=interpolation,
                out=out_VBCHW[view, number],
            )
