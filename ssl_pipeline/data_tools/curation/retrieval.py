"""Images of a pool that are like those of a seed set (DINOv2, https://arxiv.org/abs/2304.07193, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.eval.search.near_pairs import parts_of, unit_rows
from ssl_pipeline.eval.search.neighbours import nearest_neighbours

POOL_ROWS = 262_144  # images of the pool that are held at once: 1.3 GB of 1,280 float32

# Axes: N images of the pool, M seeds, K retrieved of each.


def retrieve(pool_ND: Tensor, seeds_MD: Tensor, *, k: int, rows: int = POOL_ROWS) -> tuple[Tensor, Tensor]:
    """Cosine similarities and numbers (M, K) of the K = min(k, N) images of the pool nearest to each seed, exactly.

    The pool is read a part at a time, so that memory does not grow with it.
    """
    k = min(k, len(pool_ND))
    seeds = torch.cat([unit_rows(seeds_MD, part) for part in parts_of(len(seeds_MD))])
    best_MK = seeds.new_empty(len(seeds), 0)
    numbers_MK = torch.empty(len(seeds), 0, dtype=torch.long)
    for part in parts_of(len(pool_ND), rows):
        found = nearest_neighbours(unit_rows(pool_ND, part), seeds, k=min(k, part.stop - part.start))
        both, numbers = torch.cat([best_MK, found[0]], dim=1), torch.cat([numbers_MK, found[1] + part.start], dim=1)
        best_MK, order = both.topk(min(k, both.shape[1]), dim=1)
        numbers_MK = numbers.gather(1, order)
    return best_MK, numbers_MK
