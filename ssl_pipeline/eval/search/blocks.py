"""Exact nearest neighbours from coarse scores: the maxima of blocks say where to look, float32 decides.

All training images are scored in a format that the hardware multiplies fast. What the format leaves off is measured,
so that each coarse score is known to lie within an error of the true one; whatever could still be among the k best is
scored again in float32. The result is that of an exhaustive search, whatever the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_pipeline.eval.progress import counted

SEARCH_MEMORY = 2**30  # bytes of temporary tensors; the coarse copy of the training features comes on top
MOST_QUERIES = 512  # per block of queries: more make the product no faster, and their scores are fresh memory
MULTIPLIED_ROWS = 32_768  # training rows of one product: what the library packs of them is not in SEARCH_MEMORY
MORE = 64  # scores that are taken beyond the k best at once; most often they hold all that could be among these
CACHED = 2**22  # bytes of features that a CPU rounds or scores again at once: out of its cache that takes twice as long
ROUNDED = 2**26  # bytes that other devices round at once

# Axes: M training images, N queries, D feature dimensions, B blocks of R scores (block b holds the scores b, b + B,
# b + 2B, ...: their maxima are then elementwise ones), X scores and C candidates of one query.


@dataclass(frozen=True)
class Plan:
    """How the work is cut: into blocks of blocks of training images, and into `queries` per product."""

    sizes: tuple[int, ...]
    """Scores in a block, then blocks in a block of blocks, and so on."""
    columns: int
    """Scores of a query: the training images, filled up to whole blocks."""
    queries: int
    limit: int
    """Blocks, and then candidates, that one query may keep; a query that needs more is searched exhaustively."""
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
    sizes = (size, size) if size * size * k <= num_train else ()
    block = math.prod(sizes)
    columns = -(-num_train // block) * block
    limit = 4 * k + 256
    kept = min(limit, columns // block)
    per_query = (
        columns * itemsize  # scores
        + sum(columns // math.prod(sizes[: n + 1]) for n in range(len(sizes))) * (itemsize + 5)  # maxima: as float32
        + len(sizes) * kept * size * (itemsize + 5)  # scores of kept blocks
        + (kept + limit) * (16 + itemsize)  # what is kept of them
        + limit * 50  # candidates: numbers, similarities, order
    )
    rescored = max(4 * limit * dim, min(rescored, memory // 4))
    queries = max(1, min(MOST_QUERIES, (memory - rescored) // per_query))
    return Plan(sizes, columns, queries, limit, rescored, queries * per_query + rescored)


@dataclass(frozen=True)
class CoarseFeatures:
    """Training features in the dtype of `rows` (M, D), less their mean, which moves all scores of a query alike.

    `rounding` is the largest length of what a row lost; `longest` is at least that of a rounded row, `largest` at least
    that of a row as it was.
    """

    rows: Tensor
    rounding: Tensor
    longest: Tensor
    largest: Tensor

    @classmethod
    def of(cls, train_MD: Tensor, dtype: torch.dtype) -> CoarseFeatures:
        """In float32 the features themselves: nothing is lost, nothing is copied."""
        on_cpu = train_MD.device.type == "cpu"
        parts = train_MD.split(max(1, (CACHED if on_cpu else ROUNDED) // (4 * train_MD.shape[1])))
        if dtype == torch.float32:
            largest = torch.stack([rows.norm(dim=1).max() for rows in parts]).max()
            return cls(train_MD, largest.new_zeros(()), largest, largest)
        mean_D = train_MD.mean(dim=0)
        rows_MD = torch.empty_like(train_MD, dtype=dtype)
        lengths = []
        buffers_2XD = parts[0].new_empty(2, *parts[0].shape)  # once: new memory for each part took half of the time
        for rows, rounded in zip(parts, rows_MD.split(len(parts[0])), strict=True):
            centred, lost = buffers_2XD[:, : len(rows)]
            rounded.copy_(torch.sub(rows, mean_D, out=centred))
            torch.sub(centred, lost.copy_(rounded), out=lost)
            lengths.append(torch.stack([part.norm(dim=1).max() for part in (lost, centred)]))
        lost, longest = torch.stack(lengths).amax(dim=0)
        return cls(rows_MD, lost, longest + lost, longest + mean_D.norm())

    def round_queries(self, queries_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Queries in the same format, and a bound (N,) on |coarse score - true score| before the score is rounded.

        With q, t a query and a training row and q', t' their rounded versions, |qt - q't'| = |q(t - t') + (q - q')t'|
        <= |q| |t - t'| + |q - q'| |t'|; the last term is float32's own error over D products, twice over.
        """
        rounded_ND = queries_ND.to(self.rows.dtype)
        lengths_N = queries_ND.norm(dim=1)
        error_N = lengths_N * self.rounding + (queries_ND - rounded_ND).norm(dim=1) * self.longest
        products = 2 * (queries_ND.shape[1] + 8) * torch.finfo(torch.float32).eps
        return rounded_ND, 1.001 * error_N + products * lengths_N * self.largest


def block_neighbours(
    train_MD: Tensor, test_ND: Tensor, *, k: int, dtype: torch.dtype, memory: int = SEARCH_MEMORY
) -> tuple[Tensor, Tensor]:
    """Similarities and training image numbers (N, k), most similar first, of equal ones the lower number first.

    `dtype` is the format of the coarse scores and changes nothing but the time.
    """
    if not len(test_ND):
        return test_ND.new_empty(0, k, dtype=torch.float32), test_ND.new_empty(0, k, dtype=torch.long)
    train_MD, test_ND = train_MD.float().contiguous(), test_ND.float().contiguous()
    coarse = CoarseFeatures.of(train_MD, dtype)
    rescored = CACHED if train_MD.device.type == "cpu" else memory
    plan = plan_search(*train_MD.shape, k=k, itemsize=dtype.itemsize, rescored=rescored, memory=memory)
    parts = test_ND.tensor_split(-(-len(test_ND) // plan.queries))  # balanced: no small product at the end
    scores_NX = train_MD.new_empty(len(parts[0]), plan.columns, dtype=dtype)
    scores_NX[:, len(train_MD) :] = -torch.inf
    found = []
    for queries_ND in counted(parts, "nearest neighbours", unit="block"):
        candidates_NC, complete_N = _candidates(coarse, queries_ND, scores_NX[: len(queries_ND)], k=k, plan=plan)
        similarities_NK, neighbours_NK = _score_again(train_MD, queries_ND, candidates_NC, k=k, memory=plan.rescored)
        hard = (~complete_N).nonzero().flatten()
        if len(hard):
            similarities_NK[hard], neighbours_NK[hard] = exhaustive_neighbours(
                train_MD, queries_ND[hard], k=k, memory=memory
            )
        found.append((similarities_NK, neighbours_NK))
    similarities, neighbours = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(neighbours)


def _candidates(
    coarse: CoarseFeatures, queries_ND: Tensor, scores_NX: Tensor, *, k: int, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Numbers (N, C) of training images among which the k best are, and whether that is certain (N,)."""
    rounded_ND, error_N = coarse.round_queries(queries_ND)
    with _float32_sums():
        for rows, columns in zip(
            coarse.rows.split(MULTIPLIED_ROWS),
            scores_NX[:, : len(coarse.rows)].split(MULTIPLIED_ROWS, dim=1),
            strict=True,
        ):
            torch.mm(rounded_ND, rows.T, out=columns)
    return _candidates_among(scores_NX, error_N, plan.sizes, k=k, limit=plan.limit)


def _candidates_among(
    scores_NX: Tensor, error_N: Tensor, sizes: tuple[int, ...], *, k: int, limit: int
) -> tuple[Tensor, Tensor]:
    """Places (N, C) among which the k best are, looked for in the blocks whose maxima could be among the k best."""
    if not sizes:
        return _could_be_best(scores_NX, error_N, k=k, limit=limit)
    scores_NRB = scores_NX.unflatten(1, (sizes[0], -1))
    kept_NB, enough_N = _candidates_among(scores_NRB.amax(dim=1), error_N, sizes[1:], k=k, limit=limit)
    kept_scores_NRB = scores_NRB.gather(2, kept_NB[:, None, :].expand(-1, sizes[0], -1))
    place_NC, complete_N = _could_be_best(kept_scores_NRB.flatten(1), error_N, k=k, limit=limit)
    num_blocks, num_kept = scores_NRB.shape[2], kept_NB.shape[1]
    return place_NC // num_kept * num_blocks + kept_NB.gather(1, place_NC % num_kept), enough_N & complete_N


def _could_be_best(scores_NX: Tensor, error_N: Tensor, *, k: int, limit: int) -> tuple[Tensor, Tensor]:
    """Places of all scores that can belong to the k best true ones, and whether `limit` places hold them (N,).

    k scores reach the k-th best one, so the k-th best true score lies at most an error below it; a true score above
    that has a coarse score at most another error below.
    """
    top = scores_NX.topk(min(k + MORE, limit, scores_NX.shape[1]))
    step = torch.finfo(scores_NX.dtype).eps  # of the scores themselves, whose rounding is half of it at most
    kth_N1 = top.values[:, k - 1 : k].float()
    lowest_N1 = kth_N1 - step * kth_N1.abs() - 2 * error_N[:, None]
    lowest_N1 -= step * lowest_N1.abs()
    width = max(int((top.values >= lowest_N1).sum(dim=1).max()), k)
    if width < top.values.shape[1] or width == scores_NX.shape[1]:
        return top.indices[:, :width], torch.ones_like(error_N, dtype=torch.bool)
    counts_N = (scores_NX >= lowest_N1).sum(dim=1)
    width = min(int(counts_N.max()), limit)
    return scores_NX.topk(width, sorted=False).indices, counts_N <= width


def _score_again(
    train_MD: Tensor, queries_ND: Tensor, candidates_NC: Tensor, *, k: int, memory: int
) -> tuple[Tensor, Tensor]:
    """The k best candidates by their products in float32; the sums of equal rows are equal wherever they are."""
    similarities = []
    rows = max(1, memory // (4 * candidates_NC.shape[1] * train_MD.shape[1]))
    candidates_NC = candidates_NC.sort(dim=1).values
    buffer_XD = train_MD.new_empty(min(rows, len(queries_ND)) * candidates_NC.shape[1], train_MD.shape[1])
    for queries, candidates in zip(queries_ND.split(rows), candidates_NC.split(rows), strict=True):
        numbers = candidates.clamp(max=len(train_MD) - 1).flatten()
        features_XD = torch.index_select(train_MD, 0, numbers, out=buffer_XD[: len(numbers)])
        similarities.append(features_XD.unflatten(0, candidates.shape).mul_(queries[:, None]).sum(dim=2))
    padding_NC = candidates_NC >= len(train_MD)
    best = torch.cat(similarities).masked_fill_(padding_NC, -torch.inf).sort(dim=1, descending=True, stable=True)
    return best.values[:, :k], candidates_NC.gather(1, best.indices[:, :k])


def exhaustive_neighbours(
    train_MD: Tensor, test_ND: Tensor, *, k: int, memory: int = SEARCH_MEMORY
) -> tuple[Tensor, Tensor]:
    """The same from all products in float64: for queries that more than a few images are equally near to."""
    num_train = len(train_MD)
    descending_M = torch.arange(2 * num_train, num_train, -1, device=train_MD.device)
    found = []
    for queries_ND in test_ND.split(max(1, memory // (48 * num_train))):
        scores_NM = torch.cat([(queries_ND.double() @ rows.double().T).float() for rows in train_MD.split(4096)], dim=1)
        kth_N1 = scores_NM.topk(k).values[:, -1:]
        # above the k-th: M+1 to 2M, equal to it: 1 to M, the lower image number first
        rank_NM = descending_M - num_train * (scores_NM <= kth_N1).long()
        rank_NM.masked_fill_(scores_NM < kth_N1, 0)
        neighbours_NK = rank_NM.topk(k).indices.sort(dim=1).values
        best = scores_NM.gather(1, neighbours_NK).sort(dim=1, descending=True, stable=True)
        found.append((best.values, neighbours_NK.gather(1, best.indices)))
    similarities, neighbours = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(neighbours)


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Products of bfloat16 on a GPU sum in float32 throughout, as the error bound assumes."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
