"""The views of an image that evaluation sees: its central square, or for segmentation the whole image as a square."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import interpolate

Interpolation = Literal["bicubic", "bilinear"]
Fit = Literal["crop", "stretch"]
LARGEST_UNCUT_SIZE = 96  # small images fill their frame: nothing is cut from the shorter side
CROP_RATIO = 256 / 224
LONGEST_SIDE = 4  # times the shorter one; what lies beyond never reaches the central square


def central_crop(image_HWC: Tensor, size: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """The evaluation view (3, size, size) of an 8-bit image (H, W, 3)."""
    longest = LONGEST_SIDE * min(image_HWC.shape[:2])
    for side in (0, 1):
        length = image_HWC.shape[side]
        if length > longest:
            image_HWC = image_HWC.narrow(side, (length - longest) // 2, longest)
    height, width, _ = image_HWC.shape
    shorter = size if size <= LARGEST_UNCUT_SIZE else round(size * CROP_RATIO)
    image_1CHW = image_HWC.permute(2, 0, 1)[None]
    if min(height, width) != shorter:
        scaled = (
            (shorter, int(shorter * width / height)) if height <= width else (int(shorter * height / width), shorter)
        )
        image_1CHW = interpolate(image_1CHW, size=scaled, mode=interpolation, antialias=True)
    height, width = image_1CHW.shape[-2:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image_1CHW[0, :, top : top + size, left : left + size].contiguous()


def stretched(image_HWC: Tensor, size: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """The whole of an 8-bit image (H, W, 3) as (3, size, size), antialiased; its sides may change their ratio."""
    image_1CHW = image_HWC.permute(2, 0, 1)[None]
    if image_1CHW.shape[-2:] != (size, size):
        image_1CHW = interpolate(image_1CHW, size=(size, size), mode=interpolation, antialias=True)
    return image_1CHW[0].contiguous()
