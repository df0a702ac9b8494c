"""Images mixed with other images of their batch, and batches cut into others; what is drawn is an argument.

mixup (Zhang et al., 2017, https://arxiv.org/abs/1710.09412) as MixMatch uses it (Berthelot et al., 2019,
https://arxiv.org/abs/1905.02249), CutMix (Yun et al., 2019, https://arxiv.org/abs/1905.04899), and the interleaving of
the official MixMatch and FixMatch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Axes: N rows, C classes, H rows and W columns of pixels.


def mixup(inputs: Tensor, targets: Tensor, *, draws: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """Each row mixed with its partner, inputs and targets alike; it stays nearer to its own.

    Shapes: inputs (N, ...), targets (N, C); draws () for all rows or (N,), in [0, 1]; partners (N,), a permutation.

        share = max(draws, 1 - draws);  row[i] = share[i] * row[i] + (1 - share[i]) * row[partners[i]]
    """
    _check_rows("mixup", inputs, targets, partners=partners)
    if draws.ndim > 1 or (draws.ndim == 1 and len(draws) != len(inputs)):
        raise ValueError(f"mixup needs draws of shape () or ({len(inputs)},). Got {tuple(draws.shape)}.")
    share = torch.maximum(draws, 1 - draws)
    return _mixed(inputs, partners, share), _mixed(targets, partners, share)


def cutmix_boxes(draws: Tensor, centres: Tensor, *, height: int, width: int) -> Tensor:
    """CutMix's boxes (N, 4), int64: top, left, bottom, right of a box that covers about 1 - draws of the image.

    Shapes: draws (N,) in [0, 1], centres (N, 2) in [0, 1), down and across. Sides are sqrt(1 - draws) of the image's;
    what lies outside of it is cut off.
    """
    if draws.ndim != 1 or centres.shape != (len(draws), 2):
        raise ValueError(
            f"cutmix_boxes needs draws (N,) and centres (N, 2). Got {tuple(draws.shape)} and {tuple(centres.shape)}."
        )
    ends = []
    for axis, size in enumerate((height, width)):
        half = (size * (1 - draws).sqrt()).long() // 2
        centre = (size * centres[:, axis]).long()
        ends.append(torch.stack([centre - half, centre + half]).clamp(0, size))
    (top, bottom), (left, right) = ends
    return torch.stack([top, left, bottom, right], dim=1)


def cutmix(images: Tensor, targets: Tensor, *, boxes: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """The box of each image filled from its partner; targets mixed by the areas.

    Shapes: images (N, channels, H, W), targets (N, C); boxes (N, 4) of top, left, bottom, right, or (4,) for all;
    partners (N,), a permutation.
    """
    _check_rows("cutmix", images, targets, partners=partners)
    if images.ndim != 4 or boxes.shape not in ((4,), (len(images), 4)):
        raise ValueError(
            "cutmix needs images (N, channels, H, W) and boxes (4,) or (N, 4). "
            f"Got {tuple(images.shape)} and {tuple(boxes.shape)}."
        )
    height, width = images.shape[-2:]
    top, left, bottom, right = boxes.expand(len(images), 4).T
    inside_NH = _between(top, bottom, height)
    inside_NW = _between(left, right, width)
    inside_N1HW = (inside_NH[:, :, None] & inside_NW[:, None])[:, None]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return torch.where(inside_N1HW, images[partners], images), _mixed(targets, partners, share)


def interleave_parts(parts: Sequence[Tensor]) -> list[Tensor]:
    """MixMatch's interleaving: each part gets a group of part 0, and part 0 a group of each part; its own inverse.

    n parts of B rows each, seen as n groups of B // n rows, what is left over in the *last* groups, one row each: part
    0 gives its group i to part i and takes part i's group i. For runs in which batch norm sees one part at a time.
    """
    lengths = [len(part) for part in parts]
    if len(set(lengths)) != 1:
        raise ValueError(f"interleave_parts needs parts with one number of rows. Got {lengths}.")
    num_parts = len(parts)
    short, num_long = divmod(lengths[0], num_parts)
    sizes = [short + (group >= num_parts - num_long) for group in range(num_parts)]
    groups = [list(part.split(sizes)) for part in parts]
    for number in range(1, num_parts):
        groups[0][number], groups[number][number] = groups[number][number], groups[0][number]
    return [torch.cat(part) for part in groups]


def interleave_rows(rows: Tensor, *, size: int) -> Tensor:
    """FixMatch's interleaving: rows (G * size, ...) seen as (G, size, ...), transposed and flattened again.

    For runs in which batch norm sees one part at a time.
    """
    _check_size("interleave_rows", rows, size)
    return rows.unflatten(0, (-1, size)).transpose(0, 1).flatten(0, 1)


def deinterleave_rows(rows: Tensor, *, size: int) -> Tensor:
    """What undoes `interleave_rows` of the same size."""
    _check_size("deinterleave_rows", rows, size)
    return rows.unflatten(0, (size, -1)).transpose(0, 1).flatten(0, 1)


def _mixed(rows: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    share = share.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
    return share * rows + (1 - share) * rows[partners]


def _between(start_N: Tensor, end_N: Tensor, size: int) -> Tensor:
    """(N, size) bool."""
    place = torch.arange(size, device=start_N.device)
    return (place >= start_N[:, None]) & (place < end_N[:, None])


def _check_rows(where: str, inputs: Tensor, targets: Tensor, *, partners: Tensor) -> None:
    if not len(inputs) == len(targets) == len(partners) or targets.ndim != 2 or partners.ndim != 1:
        raise ValueError(
            f"{where} needs inputs (N, ...), targets (N, C) and partners (N,). "
            f"Got {tuple(inputs.shape)}, {tuple(targets.shape)} and {tuple(partners.shape)}."
        )


def _check_size(where: str, rows: Tensor, size: int) -> None:
    if size < 1 or len(rows) % size:
        raise ValueError(f"{where} needs a multiple of size={size} rows. Got {len(rows)}.")
