"""Position tables of patch tokens: fixed sines (MAE, MoCo v3), and learnt tables resampled to other image sizes."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

Grid = tuple[int, int]  # rows, columns of patches


def sincos_position_embedding(
    dim: int, grid: Grid, *, class_token: bool, first_half: Literal["column", "row"] = "column"
) -> Tensor:
    """A fixed table of sines and cosines: (rows * columns, dim), patches row by row.

    The first half of the dimensions encodes the column, the second half the row (MAE, He et al., 2021,
    https://arxiv.org/abs/2111.06377), or with `first_half="row"` the other way round (MoCo v3, Chen et al., 2021,
    https://arxiv.org/abs/2104.02057, on a square grid); each as the sines and then the cosines of
    position / 10000^(4i / dim) for i = 0 ... dim/4 - 1. With `class_token` a row of zeros comes first.
    """
    if dim % 4:
        raise ValueError(f"a sine-cosine position table needs a dim divisible by 4. Got {dim}.")
    if first_half not in ("column", "row"):
        raise ValueError(f"first_half must be 'column' or 'row'. Got {first_half!r}.")
    rows, columns = grid
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = (column, row) if first_half == "column" else (row, column)
    angles = [position.reshape(-1, 1) * frequencies for position in halves]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    if class_token:
        table = torch.cat([table.new_zeros(1, dim), table])
    return table.float()


def is_antialiased(model: nn.Module) -> bool:
    """Whether the position table of a timm network is resampled with antialiasing, as timm does.

    DINO's and DINOv2's official code does it without, for all of timm's VisionTransformer but those with registers.
    """
    return not isinstance(model, VisionTransformer) or model.num_reg_tokens > 0


def resample_positions(table: Tensor, old: Grid, new: Grid, *, antialias: bool = False) -> Tensor:
    """(1, rows * columns, D) of the old grid -> the same of the new grid, bicubic; differentiable.

    As in DINO's official code, or with `antialias` as in timm. One product with a constant matrix, whose gradient is
    deterministic on every device, unlike that of `interpolate`.
    """
    if old == new:
        return table
    if table.is_meta:  # which has no autocast
        return _resampling_matrix(old, new, antialias, table.device, table.dtype) @ table
    with torch.autocast(table.device.type, enabled=False):
        return _resampling_matrix(old, new, antialias, table.device, table.dtype) @ table


@torch.compiler.assume_constant_result
def _resampling_matrix(old: Grid, new: Grid, antialias: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _cached_matrix(
        old, new, antialias, device, dtype
    )  # the compiler looks through a cache, so it is behind this


@functools.lru_cache(maxsize=64)
def _cached_matrix(old: Grid, new: Grid, antialias: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(new patches, old patches): the bicubic interpolation of each unit table."""
    num_old = old[0] * old[1]
    unit_tables = torch.eye(num_old, dtype=torch.float64).view(num_old, 1, *old)
    if antialias:
        resampled = F.interpolate(unit_tables, size=new, mode="bicubic", antialias=True)
    else:
        # DINO's official code asks for 0.1 patch more than there are and samples with that scale
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        resampled = F.interpolate(unit_tables, scale_factor=scale, mode="bicubic")
    matrix = resampled.reshape(num_old, new[0] * new[1]).T.to(dtype).contiguous()
    return matrix.to(device, non_blocking=True)  # a Gram teacher's first step has it made in the middle of a run
