"""Pictures of the page: pixels as data URLs, thumbnails, tensors of a network as colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_pipeline.data.evaluation import EvaluationSet
from ssl_pipeline.data.shards.open import ShardIndex

SIDE = 96  # pixels of a thumbnail: sharp on the screen of a phone
HEAT = ((0.05, 0.03, 0.25), (0.45, 0.08, 0.45), (0.85, 0.25, 0.35), (0.98, 0.6, 0.25), (0.99, 0.95, 0.7))

# Axes: H and W pixels, C colours.


def data_url(image_CHW: Tensor, *, quality: int = 82) -> str:
    """An image in [0, 255] as a data URL: PNG for small images, JPEG otherwise."""
    pixels_HWC = image_CHW.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    file, kind = io.BytesIO(), "png" if max(pixels_HWC.shape[:2]) <= 32 else "jpeg"
    if kind == "png":
        Image.fromarray(pixels_HWC).save(file, format=kind, optimize=True)
    else:
        Image.fromarray(pixels_HWC).save(file, format=kind, quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def thumbnail(index: ShardIndex, sample: int, *, side: int = SIDE) -> str:
    """The centre of an image as a data URL; DataError if it cannot be decoded."""
    image_CHW, _, _ = EvaluationSet(index, side)[sample]
    return data_url(image_CHW)


def as_pixels(images_NCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images in [0, 255], as a network sees them and people can."""
    mean_C, std_C = (torch.tensor(tuple(values)).view(3, 1, 1) for values in (mean, std))
    return (images_NCHW.detach().float().cpu() * std_C + mean_C) * 255


def at_least(image_CHW: Tensor, side: int, *, mode: str = "nearest") -> Tensor:
    """An image enlarged to `side` pixels or more, each pixel a square (`nearest`) or smoothly (`bilinear`)."""
    factor = -(-side // image_CHW.shape[-1])
    return F.interpolate(image_CHW[None].float(), scale_factor=factor, mode=mode)[0] if factor > 1 else image_CHW


def heat(values_HW: Tensor, image_CHW: Tensor) -> Tensor:
    """Values as colours from dark to bright over a gray image in [0, 255], both of any size; the image's size out."""
    size = image_CHW.shape[-2:]
    values_HW = F.interpolate(values_HW[None, None].float(), size=size, mode="bicubic", antialias=False)[0, 0]
    low, high = values_HW.min(), values_HW.max()
    places_HW = ((values_HW - low) / (high - low).clamp(min=1e-12) * (len(HEAT) - 1)).clamp(0, len(HEAT) - 1)
    below_HW = places_HW.floor().long().clamp(max=len(HEAT) - 2)
    colours, rest_HW = torch.tensor(HEAT), (places_HW - below_HW)[..., None]
    colour_CHW = (colours[below_HW] * (1 - rest_HW) + colours[below_HW + 1] * rest_HW).permute(2, 0, 1) * 255
    return 0.3 * image_CHW.float().mean(dim=0) + 0.7 * colour_CHW
