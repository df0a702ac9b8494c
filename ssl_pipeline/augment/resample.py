"""Crop and antialiased resize of a whole batch on its device: two batched matrix products with Pillow's filters.

The filters are those of Pillow's `resize` and of torch's antialiased `interpolate` (Keys, 1981, with a = -0.5, for
bicubic), so in float the result is theirs. Unlike the 8-bit kernel of `crops`, nothing is rounded on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# V views of each of B images; N crops of a chunk, each padded to H rows of W pixels; S x S pixels out; T filter taps

Integers = NDArray[np.int64]
CHUNK_ELEMENTS = 2**24  # numbers in one padded buffer: 64 MB of float32
PADDING_MATTERS = 2**22  # from here on a chunk may end early, for crops of half the area to be padded to less
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}  # pixels to either side of the centre, at scales up to 1


class Column(IntEnum):
    """What is known of one crop: its image in the flat buffer, its box, whether it is flipped."""

    OFFSET = 0  # of the image's first byte
    IMAGE_HEIGHT = 1
    IMAGE_WIDTH = 2
    TOP = 3
    LEFT = 4
    HEIGHT = 5
    WIDTH = 6
    FLIP = 7


@torch.no_grad()
def crop_and_resize_batch(
    pixels: Tensor,
    offsets_B: Integers,
    heights_B: Integers,
    widths_B: Integers,
    boxes_VB4: Integers,
    flips_VB: NDArray[np.bool_],
    *,
    size: int,
    interpolation: str,
) -> Tensor:
    """Every view of every image of a flat buffer, (V,B,3,S,S) float32 in [0, 255] on the buffer's device.

    `pixels` are 8 bits: image b begins at byte `offsets_B[b]` and holds height * width * 3 of them. Boxes and flips are
    those of `crop_boxes`, and like the offsets they stay on the host, so that no size has to be asked of the device;
    where a box reaches out of its image, the image is reflected without repeating its edge. Values are clamped, not
    rounded: they equal `interpolate(crop.float(), antialias=True).clamp(0, 255)` to 1e-3 levels, provided that matrix
    products of float32 are just that: `torch.backends.cuda.matmul.allow_tf32`, off by default, keeps 10 bits of 23.
    """
    crops_VB8 = np.stack(
        np.broadcast_arrays(offsets_B, heights_B, widths_B, *np.moveaxis(boxes_VB4, -1, 0), flips_VB), axis=-1
    ).astype(np.int64)
    num_views, num_images = flips_VB.shape
    crops_N8 = crops_VB8.reshape(-1, len(Column))
    if pixels.numel() < (needed := bytes_read(crops_N8)):
        pixels = torch.nn.functional.pad(pixels, (0, needed - pixels.numel()))
    out_NCHW = torch.empty((len(crops_N8), 3, size, size), dtype=torch.float32, device=pixels.device)
    order_N = np.argsort(-crops_N8[:, Column.HEIGHT] * crops_N8[:, Column.WIDTH], kind="stable")
    host_N9 = np.concatenate((crops_N8, np.arange(len(crops_N8))[:, None]), axis=1)[order_N]
    table_N9 = torch.from_numpy(host_N9)
    if pixels.is_cuda:  # what is not page-locked is copied while the host waits for the stream
        table_N9 = table_N9.pin_memory()
    device_N9 = table_N9.to(pixels.device, non_blocking=pixels.is_cuda)
    autocasts = torch.amp.is_autocast_available(pixels.device.type)
    with torch.autocast(pixels.device.type, enabled=False) if autocasts else nullcontext():
        for chunk in _chunks(host_N9):
            crops_N3SS = _resample(pixels, host_N9[chunk], device_N9[chunk], size=size, interpolation=interpolation)
            out_NCHW.index_copy_(0, device_N9[chunk, -1], crops_N3SS)
    return out_NCHW.view(num_views, num_images, 3, size, size)


def bytes_read(crops_N8: Integers) -> int:
    """How long the flat buffer has to be: each row is read up to the length of the longest, past its image's end."""
    before_N = crops_N8[:, Column.OFFSET] + 3 * (crops_N8[:, Column.IMAGE_HEIGHT] - 1) * crops_N8[:, Column.IMAGE_WIDTH]
    longest = np.maximum(crops_N8[:, Column.WIDTH], crops_N8[:, Column.IMAGE_WIDTH]).max()
    return int((before_N + 3 * crops_N8[:, Column.LEFT].clip(min=0)).max() + 3 * longest)


def _chunks(crops_N9: Integers) -> Iterator[slice]:
    """Slices of crops, sorted by falling area, that are padded to the same size."""
    heights_N, widths_N = crops_N9[:, Column.HEIGHT].tolist(), crops_N9[:, Column.WIDTH].tolist()
    first, tallest, widest = 0, 0, 0
    for number, (height, width) in enumerate(zip(heights_N, widths_N, strict=True)):
        before = 3 * tallest * widest * (number - first)
        tallest, widest = max(tallest, height), max(widest, width)
        with_it = 3 * tallest * widest * (number - first + 1)
        small = before > PADDING_MATTERS and 2 * height * width < heights_N[first] * widths_N[first]
        if number > first and (with_it > CHUNK_ELEMENTS or small):
            yield slice(first, number)
            first, tallest, widest = number, height, width
    if heights_N:
        yield slice(first, len(heights_N))


def _resample(pixels: Tensor, host_N9: Integers, crops_N9: Tensor, *, size: int, interpolation: str) -> Tensor:
    """One chunk, (N,3,S,S) with values in [0, 255]; `host_N9` and `crops_N9` are the same numbers."""
    offset_N, image_height_N, image_width_N, top_N, left_N, height_N, width_N, flip_N = crops_N9.T[: len(Column)]
    tallest, widest = (int(host_N9[:, column].max()) for column in (Column.HEIGHT, Column.WIDTH))
    rows_NSH = _weights(height_N, tallest, size=size, interpolation=interpolation)
    columns_NSW = _weights(width_N, widest, size=size, interpolation=interpolation, flip_N=flip_N)
    sticks_out = (host_N9[:, Column.LEFT] < 0) | (
        host_N9[:, Column.LEFT] + host_N9[:, Column.WIDTH] > host_N9[:, Column.IMAGE_WIDTH]
    )
    if sticks_out.any():  # rows of the whole image, and the reflection becomes part of the weights
        widest_image = int(host_N9[:, Column.IMAGE_WIDTH].max())
        columns_NSW = columns_NSW @ _reflections(left_N, image_width_N, widest, widest_image)
        left_N, widest = torch.zeros_like(left_N), widest_image
    padded_NH3W = _gather(pixels, offset_N, image_height_N, image_width_N, top_N, left_N, tallest, widest)
    num_crops = len(crops_N9)
    if widest <= tallest:  # rows first: S * W * (H + S) products
        half_N3SW = (rows_NSH @ padded_NH3W.view(num_crops, tallest, 3 * widest)).view(num_crops, size * 3, widest)
        crops_NS3S = half_N3SW @ columns_NSW.mT
    else:  # columns first: S * H * (W + S)
        half_NH3S = (padded_NH3W.view(num_crops, tallest * 3, widest) @ columns_NSW.mT).view(num_crops, tallest, -1)
        crops_NS3S = rows_NSH @ half_NH3S
    return crops_NS3S.clamp_(0, 255).view(num_crops, size, 3, size).transpose(1, 2)


def _gather(
    pixels: Tensor,
    offset_N: Tensor,
    image_height_N: Tensor,
    image_width_N: Tensor,
    top_N: Tensor,
    left_N: Tensor,
    tallest: int,
    widest: int,
) -> Tensor:
    """The crops' rows (N,H,3,W) float32; what follows a crop in the buffer fills up its rows, and has no weight."""
    row_NH = top_N[:, None] + torch.arange(tallest, device=pixels.device)
    last_N1 = image_height_N[:, None] - 1
    row_NH = (last_N1 - (last_N1 - row_NH.abs()).abs()).clamp_(min=0)
    start_NH = offset_N[:, None] + 3 * (row_NH * image_width_N[:, None] + left_N[:, None])
    # a view in which row i is the bytes from i on: whole rows are copied, and only their beginnings are looked up;
    # not by index_select, which on a GPU counts the elements of the view, and those need 64 bits
    windows = pixels.unfold(0, 3 * widest, 1)
    interleaved_NHW3 = windows[start_NH].view(len(offset_N), tallest, widest, 3)
    return interleaved_NHW3.transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)


def _reflections(left_N: Tensor, image_width_N: Tensor, width: int, image_width: int) -> Tensor:
    """Which column of its image each column of a crop shows: (N, width, image_width) of zeros and ones."""
    column_NW = left_N[:, None] + torch.arange(width, device=left_N.device)
    last_N1 = image_width_N[:, None] - 1
    column_NW = last_N1 - (last_N1 - column_NW.abs()).abs()
    return (column_NW[..., None] == torch.arange(image_width, device=left_N.device)).float()


def _weights(length_N: Tensor, longest: int, *, size: int, interpolation: str, flip_N: Tensor | None = None) -> Tensor:
    """What each pixel of a side contributes to each pixel of the resized one: (N, S, longest), 0 beyond its length.

    With scale = length / S and reach = max(scale, 1), pixel j has in pixel i the weight
    filter((j + 1/2 - scale * (i + 1/2)) / reach), divided by the sum over j.
    """
    device = length_N.device
    target_NS = torch.arange(size, device=device).expand(len(length_N), size)
    if flip_N is not None:
        target_NS = torch.where(flip_N[:, None] > 0, size - 1 - target_NS, target_NS)
    scale_N1 = length_N[:, None].float() / size
    reach_N1 = scale_N1.clamp(min=1)
    centre_NS = scale_N1 * (target_NS + 0.5)
    # only the taps are worked out: a few columns instead of all
    num_taps = min(math.ceil(2 * SUPPORT[interpolation] * max(longest / size, 1)) + 2, longest)
    first_NS = (centre_NS - SUPPORT[interpolation] * reach_N1).long().clamp_(0, longest - num_taps)
    tap_NST = first_NS[..., None] + torch.arange(num_taps, device=device)
    distance_NST = ((tap_NST - centre_NS[..., None] + 0.5) / reach_N1[..., None]).abs_()
    weight_NST = _filter(distance_NST, interpolation) * (tap_NST < length_N[:, None, None])
    weight_NST /= weight_NST.sum(dim=-1, keepdim=True)
    weights_NSL = torch.zeros((len(length_N), size, longest), dtype=torch.float32, device=device)
    return weights_NSL.scatter_(2, tap_NST, weight_NST)


def _filter(distance: Tensor, interpolation: str) -> Tensor:
    """Weight at a distance >= 0: the triangle, or Keys' cubic with a = -1/2."""
    if interpolation == "bilinear":
        return (1 - distance).clamp_(min=0)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
