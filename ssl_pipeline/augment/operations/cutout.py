"""Cutout as in FixMatch's strong views: a gray square at a random place (https://arxiv.org/abs/2001.07685)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment.operations.base import Operation, ViewSettings
from ssl_pipeline.config import InRange

CUTOUT_LEVEL = 127.0


class CutoutSettings(ViewSettings):
    """How large the square is."""

    cutout: Annotated[tuple[float, float], InRange(ge=0, le=1, increasing=True)] = (0.0, 0.0)
    """Smallest and largest side of a gray square at a random place, as a fraction of the view."""


class Cutout(Operation[CutoutSettings, bool]):
    """A gray square. Draws: its top, left, bottom and right in pixels; all 0 without one.

    Its side is uniform in `cutout` and its centre anywhere; as in TorchSSL it is moved in at the top and at the left,
    and cut off at the bottom and at the right.
    """

    settings = CutoutSettings

    def num_uniforms(self, group: CutoutSettings) -> int:
        return 3 if group.cutout[1] else 0

    def num_draws(self, group: CutoutSettings) -> int:
        return 4 if group.cutout[1] else 0

    def draw(self, uniforms_VBU: NDArray[np.float64], group: CutoutSettings, *, size: int) -> NDArray[np.float32]:
        low, high = group.cutout
        side_VB1, centre_VB2 = uniforms_VBU[..., :1], uniforms_VBU[..., 1:]
        side_VB1 = np.rint(size * (low + (high - low) * side_VB1))
        start_VB2 = np.floor(np.maximum(0, size * centre_VB2 - side_VB1 / 2))
        return np.concatenate((start_VB2, np.minimum(size, start_VB2 + side_VB1)), axis=-1).astype(np.float32)

    def setting(self, group: CutoutSettings, view: int, *, size: int) -> bool | None:
        return group.cutout[1] > 0 or None

    def on_cpu(self, image_NCHW: Tensor, draws_NP: Tensor, setting: bool) -> Tensor:
        return cut_out(image_NCHW, draws_NP)

    def on_accelerator(self, image_NCHW: Tensor, draws_NP: Tensor, setting: bool) -> Tensor:
        return cut_out(image_NCHW, draws_NP)


def cut_out(image_NCHW: Tensor, box_N4: Tensor) -> Tensor:
    """A gray square, rows top to bottom - 1 and columns left to right - 1, over each image in [0, 1]."""
    top_N1, left_N1, bottom_N1, right_N1 = box_N4.split(1, dim=1)
    row_S, column_S = (torch.arange(size, device=image_NCHW.device) for size in image_NCHW.shape[2:])
    rows_NS = (row_S >= top_N1) & (row_S < bottom_N1)
    columns_NS = (column_S >= left_N1) & (column_S < right_N1)
    return image_NCHW.masked_fill(rows_NS[:, None, :, None] & columns_NS[:, None, None, :], CUTOUT_LEVEL / 255)
