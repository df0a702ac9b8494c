"""Exact nearest neighbours from coarse scores: the maxima of blocks say where to look, float32 decides.

All training images are scored in a format that the hardware multiplies fast, within a known error (see `coarse`);
whatever could still be among the k best is scored again in float32. The result is that of an exhaustive search,
whatever the format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ssl_pipeline.eval.progress import counted
from ssl_pipeline.eval.search.coarse import CACHED, SCORES, CoarseFeatures, lowest_scores

SEARCH_MEMORY = 2**30  # bytes of temporary tensors; the coarse copy of the training features comes on top
MOST_QUERIES = 512  # per block of queries: more make the product no faster, and their scores are fresh memory
FILLED, WORTH_FILLING = 32, 256  # queries
WORTH_SCORING = 1 / 200  # of all images, again, beyond the k best: with more, a finer format is faster

# Axes: M training images, N queries, D feature dimensions, X scores of one query, in blocks of R (of B blocks, block b
# holds the scores b, b + B, b + 2B, ...: their maxima are then elementwise ones), P pairs of a query and a candidate,
# C candidates of one query.


@dataclass(frozen=True)
class Plan:
    """How the work is cut: into blocks of blocks of training images, and into `queries` per product."""

    sizes: tuple[int, ...]
    """Scores in a block, then blocks in a block of blocks, and so on."""
    columns: int
    """Scores of a query: the training images, filled up to whole blocks."""
    queries: int
    limit: int
    """Blocks, and then candidates, that one query may keep; where it needs more, it is searched exhaustively."""
    rescored: int
    """Bytes of features that are scored again at once."""
    bytes: int
    """Bound on the temporary tensors."""


def plan_search(num_train: int, dim: int, *, k: int, itemsize: int, rescored: int, memory: int) -> Plan:
    """The plan whose temporary tensors take at most `memory` bytes, or those of one query where that is more.

    Both sizes are about the cube root of M / k, so that each of the three stages compares about as many scores.
    `rescored` are the bytes of features to score again at once, at least those of one query.
    """
    size = 2 ** round(math.log2(num_train / k) / 3)
    sizes = (size, size) if 1 < size * size <= num_train // k else ()
    block = math.prod(sizes)
    columns = -(-num_train // block) * block
    limit = 4 * k + 256
    maxima = [columns // math.prod(sizes[: n + 1]) for n in range(len(sizes))]
    per_query = (
        columns * itemsize  # scores
        + sum(maxima) * (itemsize + 5)  # and a copy of the last ones, and which of them are kept
        + limit * max(sizes, default=0) * (2 * itemsize + 2)  # scores in kept blocks, and which of them are kept
        + limit * 150  # pairs, then candidates: numbers, similarities, order
    )
    rescored = max(8 * dim, min(rescored, memory // 4))
    queries = max(1, min(MOST_QUERIES, (memory - rescored) // per_query))
    queries = queries if queries < WORTH_FILLING else queries // FILLED * FILLED
    return Plan(sizes, columns, queries, limit, rescored, queries * per_query + rescored)


@torch.no_grad()
def block_neighbours(
    train_MD: Tensor, test_ND: Tensor, *, k: int, formats: Sequence[torch.dtype], memory: int = SEARCH_MEMORY
) -> tuple[Tensor, Tensor]:
    """Similarities and training image numbers (N, k), most similar first, of equal ones the lower number first.

    Coarse scores are in the first of `formats`, and in the next from where one leaves too many candidates on. Formats
    change nothing but the time.
    """
    if not len(test_ND):
        return test_ND.new_empty(0, k, dtype=torch.float32), test_ND.new_empty(0, k, dtype=torch.long)
    train_MD, test_ND = train_MD.float().contiguous(), test_ND.float().contiguous()
    itemsize = max(SCORES[dtype].itemsize for dtype in formats)
    rescored = CACHED if train_MD.device.type == "cpu" else memory
    plan = plan_search(*train_MD.shape, k=k, itemsize=itemsize, rescored=rescored, memory=memory)
    first, *finer = formats
    coarse = _CoarseSearch(train_MD, first, plan, k)
    num_parts = -(-len(test_ND) // plan.queries)
    parts = test_ND.split(_filled(-(-len(test_ND) // num_parts)))  # about equal: no small product at the end
    found = []
    for queries_ND in counted(parts, "nearest neighbours", unit="block"):
        image_P, query_P = coarse.candidates(queries_ND)
        while finer and _too_many(query_P, len(queries_ND), k=k, num_train=len(train_MD)):
            del coarse  # its memory is the next one's
            coarse = _CoarseSearch(train_MD, finer.pop(0), plan, k)
            image_P, query_P = coarse.candidates(queries_ND)
        similarities_NK, neighbours_NK = _score_again(train_MD, queries_ND, image_P, query_P, k=k, memory=plan.rescored)
        hard = (~similarities_NK.isfinite().all(dim=1)).nonzero().flatten()
        if len(hard):
            coarse.free_scores()
            similarities_NK[hard], neighbours_NK[hard] = exhaustive_neighbours(
                train_MD, queries_ND[hard], k=k, memory=memory
            )
        found.append((similarities_NK, neighbours_NK))
    similarities, neighbours = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(neighbours)


class _CoarseSearch:
    """Finds what could be among the k best, in one format and in memory for the scores that it keeps."""

    def __init__(self, train_MD: Tensor, dtype: torch.dtype, plan: Plan, k: int) -> None:
        self.coarse = CoarseFeatures.of(train_MD, dtype)
        self.plan, self.k = plan, k
        self.memory = train_MD.new_empty(0, dtype=SCORES[dtype])
        self.lowest, self.highest = _range(SCORES[dtype])

    def free_scores(self) -> None:
        """They take new memory the next time."""
        self.memory = self.memory.new_empty(0)

    def candidates(self, queries_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Images (P,) and queries (P,) of pairs among which each query's k best are; none of a query with too many.

        The k-th best of the maxima of blocks says below which score none of the k best can be: such images are left
        out, and so is each block whose maximum is below.
        """
        scores_XN, error_N = self._scores(queries_ND)
        levels = [scores_XN]
        for size in self.plan.sizes:
            levels.append(levels[-1].unflatten(0, (size, -1)).amax(dim=0))
        lowest_N = lowest_scores(levels[-1].topk(self.k, dim=0).values[-1], error_N)
        lowest_N.masked_fill_(~(lowest_N > self.lowest), self.highest)  # the errors are too large to tell anything
        num_queries = len(lowest_N)
        place_P, query_P = self._reached(levels.pop(), lowest_N, torch.arange(num_queries, device=lowest_N.device))
        for size, level_XN in zip(reversed(self.plan.sizes), reversed(levels), strict=True):
            pair_P = place_P * num_queries + query_P
            scores_RP = torch.stack([block_scores.take(pair_P) for block_scores in level_XN.view(size, -1)])
            row_P, column_P = self._reached(scores_RP, lowest_N, query_P)
            place_P, query_P = row_P * (len(level_XN) // size) + place_P[column_P], query_P[column_P]
        return place_P, query_P

    def _scores(self, queries_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (X, N) and bounds (N,) on their errors; N is filled up by queries without candidates."""
        rounded_ND, error_N = self.coarse.round_queries(queries_ND)
        missing = _filled(len(queries_ND)) - len(queries_ND)
        size = self.plan.columns * (len(queries_ND) + missing)
        if len(self.memory) < size:
            self.memory = self.memory.new_empty(size)
        scores_XN = self.memory[:size].view(self.plan.columns, -1)
        num_train = len(self.coarse.rows)
        self.coarse.scores(pad(rounded_ND, (0, 0, 0, missing)), out=scores_XN[:num_train])
        scores_XN[num_train:] = self.lowest
        return scores_XN, pad(error_N, (0, missing), value=-torch.inf)

    def _reached(self, scores_RP: Tensor, lowest_N: Tensor, query_P: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of scores that are not too low; a query that keeps too many is left out from here on."""
        reached_RP = scores_RP >= lowest_N[query_P]
        count_N = torch.zeros_like(lowest_N, dtype=torch.long).index_add_(0, query_P, reached_RP.sum(dim=0))
        lowest_N.masked_fill_(count_N > self.plan.limit, self.highest)
        row_P, column_P = (reached_RP & (lowest_N[query_P] < self.highest)).nonzero(as_tuple=True)
        return row_P, column_P


def _too_many(query_P: Tensor, num_queries: int, *, k: int, num_train: int) -> bool:
    """Whether more is to be scored again, for hard queries all images, than a finer format would cost."""
    hard = int((torch.bincount(query_P, minlength=num_queries) < k).sum())
    again = len(query_P) - k * (num_queries - hard) + num_train * hard
    return again > WORTH_SCORING * num_queries * num_train


def _range(dtype: torch.dtype) -> tuple[float, float]:
    """The lowest and the highest value."""
    if dtype.is_floating_point:
        return -torch.inf, torch.inf
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def _score_again(
    train_MD: Tensor, queries_ND: Tensor, image_P: Tensor, query_P: Tensor, *, k: int, memory: int
) -> tuple[Tensor, Tensor]:
    """The k best of each query by their products in float32, -inf where it has fewer than k images.

    The sums of equal rows are equal wherever they are.
    """
    num_train, dim = train_MD.shape
    pair_P = (query_P * num_train + image_P).sort().values
    query_P, image_P = pair_P // num_train, pair_P % num_train
    rows = memory // (8 * dim)
    buffer_2XD = train_MD.new_empty(2, min(rows, len(pair_P)), dim)
    products = []
    for images, queries in zip(image_P.split(rows), query_P.split(rows), strict=True):
        left_XD, right_XD = buffer_2XD[:, : len(images)]
        torch.index_select(train_MD, 0, images, out=left_XD)
        torch.index_select(queries_ND, 0, queries, out=right_XD)
        products.append(left_XD.mul_(right_XD).sum(dim=1))
    count_N = torch.bincount(query_P, minlength=len(queries_ND))
    slot_P = torch.arange(len(pair_P), device=pair_P.device) - (count_N.cumsum(0) - count_N)[query_P]
    width = max(k, int(count_N.max()))
    products_NC = queries_ND.new_full((len(queries_ND), width), -torch.inf)
    products_NC[query_P, slot_P] = torch.cat(products)
    images_NC = torch.zeros_like(products_NC, dtype=torch.long)
    images_NC[query_P, slot_P] = image_P
    best = products_NC.sort(dim=1, descending=True, stable=True)
    return best.values[:, :k], images_NC.gather(1, best.indices[:, :k])


def exhaustive_neighbours(
    train_MD: Tensor, test_ND: Tensor, *, k: int, memory: int = SEARCH_MEMORY
) -> tuple[Tensor, Tensor]:
    """As `block_neighbours`, from all products in float64: for queries that many images are about as near to."""
    num_train, dim = train_MD.shape
    rows_at_once = max(1, min(4096, memory // (64 * dim)))
    descending_M = torch.arange(2 * num_train, num_train, -1, device=train_MD.device)
    found = []
    for queries_ND in test_ND.split(max(1, memory // (56 * num_train))):
        products = [(queries_ND.double() @ rows.double().T).float() for rows in train_MD.split(rows_at_once)]
        scores_NM = torch.cat(products, dim=1)
        del products
        kth_N1 = scores_NM.topk(k).values[:, -1:]
        # above the k-th: M+1 to 2M, equal to it: 1 to M, the lower image number first
        rank_NM = descending_M - num_train * (scores_NM <= kth_N1).long()
        rank_NM.masked_fill_(scores_NM < kth_N1, 0)
        neighbours_NK = rank_NM.topk(k).indices.sort(dim=1).values
        best = scores_NM.gather(1, neighbours_NK).sort(dim=1, descending=True, stable=True)
        found.append((best.values, neighbours_NK.gather(1, best.indices)))
    similarities, neighbours = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(neighbours)


def _filled(queries: int) -> int:
    """As many, or a few more, so that each row of scores begins where a line of the cache does."""
    return queries if queries < WORTH_FILLING else -(-queries // FILLED) * FILLED
