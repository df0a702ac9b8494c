"""Pairs of images whose features are nearly the same: all of them, or in large sets those that an IVF index finds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import ConfigError
from ssl_pipeline.eval.search.neighbours import faiss_neighbours

PairSearch = Literal["auto", "exact", "ivf"]

EXACT_BELOW = 1_000_000  # images
TILE = 4096  # rows and columns of the similarities that are held at once: 64 MB
ROWS = 65_536  # images that are looked up, or read, at once
NEIGHBOURS = 64  # of each image that the IVF index gives, as DINOv2 takes them
TRAINED_PER_CELL, PROBED_SHARE = 64, 1 / 32
CODE_ERROR = 0.02  # of a similarity from 8-bit codes; what it lets in is compared again in float32

# Axes: N images, M other images, D feature dimensions, P pairs, R and C rows and columns of a tile.


class NearPairs(NamedTuple):
    """Numbers of the two images of each pair, and their cosine similarity, (P,) each."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarity: NDArray[np.float32]


def near_pairs(
    features_ND: Tensor,
    *,
    threshold: float,
    search: PairSearch = "auto",
    device: torch.device | str = "cpu",
    tile: int = TILE,
) -> Iterator[NearPairs]:
    """Pairs with a cosine similarity of `threshold` or more, a part at a time; first < second, each once.

    `exact` compares every image with every other, in tiles, so that memory does not grow with the set: N^2 D products.
    `ivf` lets FAISS's inverted file with 8-bit codes name 64 neighbours of each image, in 1/32 of the cells, and
    compares those in float32: what it names is as exact, but it misses some pairs. `auto` is `exact` below 1 M images.
    """
    if search == "exact" or (search == "auto" and len(features_ND) < EXACT_BELOW):
        return _all_pairs(features_ND, threshold, torch.device(device), tile)
    return _indexed_pairs(features_ND, threshold)


def unit_rows(features_ND: Tensor, rows: slice | NDArray[np.int64]) -> Tensor:
    """Some rows as float32 vectors of length 1; ConfigError if one is NaN or infinite."""
    chosen = features_ND[rows] if isinstance(rows, slice) else features_ND[torch.from_numpy(rows)]
    chosen = chosen.float()
    if not chosen.isfinite().all():
        raise ConfigError("Some features are NaN or infinite, so pairs cannot be found. Take another step of the run.")
    return normalize(chosen, dim=1)


def nearest_of(features_ND: Tensor, others_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine similarity (N,) of each image to the nearest of the others, and its number (N,)."""
    others = torch.cat([unit_rows(others_MD, part) for part in parts_of(len(others_MD))])
    found = [faiss_neighbours(others, unit_rows(features_ND, part), k=1) for part in parts_of(len(features_ND))]
    return torch.cat([similar[:, 0] for similar, _ in found]), torch.cat([numbers[:, 0] for _, numbers in found])


def parts_of(count: int, size: int = ROWS) -> list[slice]:
    """range(count) in slices of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _all_pairs(features_ND: Tensor, threshold: float, device: torch.device, tile: int) -> Iterator[NearPairs]:
    parts = parts_of(len(features_ND), tile)
    for number, rows in enumerate(parts):
        rows_RD = unit_rows(features_ND, rows).to(device)
        for columns in parts[number:]:
            columns_CD = rows_RD if columns == rows else unit_rows(features_ND, columns).to(device)
            similarities_RC = rows_RD @ columns_CD.T
            near_RC = similarities_RC >= threshold
            if columns == rows:
                near_RC = near_RC.triu(1)
            first_P, second_P = near_RC.nonzero(as_tuple=True)
            if len(first_P):
                yield NearPairs(
                    first_P.cpu().numpy() + rows.start,
                    second_P.cpu().numpy() + columns.start,
                    similarities_RC[first_P, second_P].cpu().numpy(),
                )


def _indexed_pairs(features_ND: Tensor, threshold: float) -> Iterator[NearPairs]:
    index = _inverted_file(features_ND)
    neighbours = min(NEIGHBOURS + 1, len(features_ND))  # each finds itself
    told = np.empty(0, np.int64)  # pairs that an image still to come may name as well
    for part in parts_of(len(features_ND)):
        rows_RD = unit_rows(features_ND, part)
        coarse_RK, numbers_RK = index.search(rows_RD.numpy(), neighbours)
        own_R1 = np.arange(part.start, part.stop)[:, None]
        first_P, place_P = np.nonzero(
            (coarse_RK >= threshold - CODE_ERROR) & (numbers_RK >= 0) & (numbers_RK != own_R1)
        )
        second_P = numbers_RK[first_P, place_P]
        for some in parts_of(len(first_P)):
            similarity = (rows_RD[first_P[some]] * unit_rows(features_ND, second_P[some])).sum(dim=1).numpy()
            near = similarity >= threshold
            ends = np.sort(np.stack([first_P[some] + part.start, second_P[some]])[:, near], axis=0)
            keys_P = ends[0] * len(features_ND) + ends[1]
            keys_P, once = np.unique(keys_P, return_index=True)  # two images may name each other, in one part or two
            new = ~np.isin(keys_P, told)
            told, once = np.concatenate([told, keys_P[new]]), once[new]
            if len(once):
                yield NearPairs(ends[0, once], ends[1, once], similarity[near][once])
        told = told[told % len(features_ND) >= part.stop]


def _inverted_file(features_ND: Tensor):  # type: ignore[no-untyped-def]  # faiss has no types
    """FAISS's IVF index with a code of 8 bits per dimension: D bytes per image in memory."""
    import faiss

    num_images, dim = features_ND.shape
    cells = max(1, min(int(4 * math.sqrt(num_images)), num_images // 4))
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim), dim, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.nprobe = max(8, int(cells * PROBED_SHARE))
    index.cp.seed = 0
    trained = min(num_images, cells * TRAINED_PER_CELL)
    spread = np.linspace(0, num_images - 1, trained).astype(np.int64)
    index.train(unit_rows(features_ND, spread).numpy())
    for part in parts_of(num_images):
        index.add(unit_rows(features_ND, part).numpy())
    return index
