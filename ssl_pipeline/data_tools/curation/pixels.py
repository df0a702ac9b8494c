"""Whether two files show one picture: small gray versions are compared, whole, cut and mirrored."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from ssl_pipeline.data.decode import DecodeError, decode_image
from ssl_pipeline.data.shards.open import ShardIndex

SIDE, READ = 32, 48  # pixels of what is compared, and of what it is cut from
WINDOWS = (1.0, 0.975, 0.95, 0.925, 0.9)  # sides of the part of one picture that the other may show, as a share
PLACES = 5  # of each part across and down: with 3, and fewer sizes, a tenth of cut copies agreed by less than 0.96
MOST_KEPT = 512  # pictures: 0.4 MB each
LUMA = (0.299, 0.587, 0.114)

# Axes: W windows of a picture, K pixels of each.


def windows_of(index: ShardIndex, sample: int) -> Tensor:
    """The picture and its parts, (W, K): gray, with mean 0 and length 1; the whole picture is the first."""
    image_HWC = torch.from_numpy(np.ascontiguousarray(decode_image(index.read(sample).image)))
    image_1CHW = image_HWC.permute(2, 0, 1)[None]
    small_3SS = interpolate(image_1CHW, size=(READ, READ), mode="bilinear", antialias=True)[0].float()
    gray_1SS = (small_3SS * torch.tensor(LUMA).view(3, 1, 1)).sum(dim=0, keepdim=True)
    grids_WSS2 = _grids()
    parts_W1SS = grid_sample(
        gray_1SS.expand(len(grids_WSS2), 1, READ, READ), grids_WSS2, padding_mode="border", align_corners=False
    )
    flat_WK = parts_W1SS.flatten(1)
    flat_WK = flat_WK - flat_WK.mean(dim=1, keepdim=True)
    return flat_WK / flat_WK.norm(dim=1, keepdim=True).clamp(min=1e-6)


def pixel_agreement(first_WK: Tensor, second_WK: Tensor) -> float:
    """The best correlation, -1 to 1, of either picture with a part of the other, as it is or mirrored."""
    scores = []
    for parts_WK, whole_WK in ((first_WK, second_WK), (second_WK, first_WK)):
        whole_SS = whole_WK[0].view(SIDE, SIDE)
        scores += [parts_WK @ whole_SS.flatten(), parts_WK @ whole_SS.flip(1).flatten()]
    return torch.cat(scores).max().item()


class PixelCheck:
    """Which pairs of images agree in their pixels, by `least` or more: pairs within one set, or of one with another.

    What was read of a picture is kept for the next pair of it, up to MOST_KEPT pictures. With least=0 nothing is read.
    """

    def __init__(self, first: ShardIndex, second: ShardIndex | None = None, *, least: float) -> None:
        self.first, self.second, self.least = first, first if second is None else second, least
        self._windows = lru_cache(maxsize=MOST_KEPT)(windows_of)

    def __call__(self, first_P: NDArray[np.int64], second_P: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(P,); a DecodeError counts as no agreement: what cannot be read is not removed as a duplicate."""
        if not self.least:
            return np.ones(len(first_P), dtype=bool)
        return np.array([self._agree(*pair) for pair in zip(first_P.tolist(), second_P.tolist(), strict=True)], bool)

    def _agree(self, first: int, second: int) -> bool:
        try:
            pair = self._windows(self.first, first), self._windows(self.second, second)
        except DecodeError:
            return False
        return pixel_agreement(*pair) >= self.least


@cache
def _grids() -> Tensor:
    """Where each part lies, in grid_sample's coordinates (W, S, S, 2): of each size in 25 places."""
    centres_S = (torch.arange(SIDE) + 0.5) / SIDE
    grids = []
    for share in WINDOWS:
        starts = [(1 - share) * place / (PLACES - 1) for place in range(PLACES)] if share < 1 else [0.0]
        for top in starts:
            for left in starts:
                down_S, across_S = (2 * (start + share * centres_S) - 1 for start in (top, left))
                rows_SS, columns_SS = torch.meshgrid(down_S, across_S, indexing="ij")
                grids.append(torch.stack([columns_SS, rows_SS], dim=-1))
    return torch.stack(grids)
