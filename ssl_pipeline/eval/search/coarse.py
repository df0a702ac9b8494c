"""Training features in a format that the hardware multiplies fast, and what their scores are off by at most.

What the format leaves off is measured, so that each coarse score is known to lie within an error of the true one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

CACHED = 2**22  # bytes of features that a CPU rounds at once: out of its cache that takes twice as long
ROUNDED = 2**26  # bytes that other devices round at once
SAMPLE = 4096  # training rows, evenly spread, whose mean is taken from all
LARGEST_COUNT = 127  # of int8, whose range is symmetric then
SCORES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int8: torch.int32}

# Axes: M training images, N queries, D feature dimensions, X rows that are rounded at once.


@dataclass(frozen=True)
class CoarseFeatures:
    """Training features in the dtype of `rows` (M, D), less about their mean: all scores of a query move alike.

    In int8 dimension d counts steps of `steps[d]`, the finest that its largest value allows; else there are no steps.
    `longest` is the largest length of `rows`, in what they count; `rounding` of what a row lost, and `largest` at least
    that of a row as it was, both in units of the features.
    """

    rows: Tensor
    steps: Tensor | None
    rounding: Tensor
    longest: Tensor
    largest: Tensor

    @classmethod
    def of(cls, train_MD: Tensor, dtype: torch.dtype) -> CoarseFeatures:
        """In float32 the features themselves: nothing is lost, nothing is copied."""
        bytes_at_once = CACHED if train_MD.device.type == "cpu" else ROUNDED
        parts = train_MD.split(max(1, bytes_at_once // (4 * train_MD.shape[1])))
        if dtype == torch.float32:
            largest = torch.stack([rows.norm(dim=1).max() for rows in parts]).max()
            return cls(train_MD, None, largest.new_zeros(()), largest, largest)
        mean_D = train_MD[:: -(-len(train_MD) // SAMPLE)].mean(dim=0)
        steps_D = _steps(train_MD, mean_D) if dtype == torch.int8 else None
        rows_MD = torch.empty_like(train_MD, dtype=dtype)
        lengths = []
        buffers_2XD = parts[0].new_empty(2, *parts[0].shape)  # once: new memory for each part took half of the time
        for rows, rounded in zip(parts, rows_MD.split(len(parts[0])), strict=True):
            centred, kept = buffers_2XD[:, : len(rows)]
            torch.sub(rows, mean_D, out=centred)
            rounded.copy_(centred if steps_D is None else torch.div(centred, steps_D, out=kept).round_())
            kept.copy_(rounded)
            longest = kept.norm(dim=1).max()
            lost = torch.sub(centred, kept if steps_D is None else kept.mul_(steps_D), out=kept)
            lengths.append(torch.stack([longest, lost.norm(dim=1).max()]))
        longest, rounding = torch.stack(lengths).amax(dim=0)
        largest = longest * (1 if steps_D is None else steps_D.max()) + rounding + mean_D.norm()
        return cls(rows_MD, steps_D, rounding, longest, largest)

    def round_queries(self, queries_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Queries for products with `rows`, and a bound (N,) on |coarse score - true score|, in what a score counts and
        before it is rounded.

        With q, t a query and a training row and q', t' their rounded versions, |qt - q't'| = |q(t - t') + (q - q')t'|
        <= |q| |t - t'| + |q - q'| |t'|; the last term is float32's own error over D products, twice over. In int8 the
        query takes the steps of the rows over, and counts steps of its own, so that a score counts those.
        """
        lengths_N = queries_ND.norm(dim=1)
        products = 2 * (queries_ND.shape[1] + 8) * torch.finfo(torch.float32).eps
        error_N = 1.001 * lengths_N * self.rounding + products * lengths_N * self.largest
        if self.steps is None:
            rounded_ND = queries_ND.to(self.rows.dtype)
            return rounded_ND, error_N + 1.001 * (queries_ND - rounded_ND).norm(dim=1) * self.longest
        folded_ND = queries_ND * self.steps
        step_N1 = _step(folded_ND.abs().amax(dim=1, keepdim=True))
        counts_ND = (folded_ND / step_N1).round()
        error_N += 1.001 * (folded_ND - counts_ND * step_N1).norm(dim=1) * self.longest
        return counts_ND.to(torch.int8), error_N / step_N1[:, 0]

    def scores(self, rounded_ND: Tensor, *, out: Tensor) -> None:
        """Products (M, N) of all rows and some rounded queries, in SCORES of the format.

        Images times queries: of factors in few bits, libraries rearrange the right one first, and it is the small one.
        """
        if self.rows.dtype == torch.int8:
            torch._int_mm(self.rows, rounded_ND.T, out=out)
        else:
            with _float32_sums():
                torch.mm(self.rows, rounded_ND.T, out=out)


def lowest_scores(kth_N: Tensor, error_N: Tensor) -> Tensor:
    """The coarse score, in the dtype of `kth_N`, that no image of the k best can be below, with the k-th best of them.

    k scores reach it, so the k-th best true score lies at most an error below; a true score above that one has a coarse
    score at most another error below.
    """
    dtype = kth_N.dtype
    if not dtype.is_floating_point:  # exact sums
        lowest_N = (kth_N.double() - 2 * error_N.double()).floor()
        return lowest_N.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)
    own_rounding_N = torch.finfo(dtype).eps / 2 * kth_N.float().abs()
    return (kth_N.float() - own_rounding_N - 2 * error_N).to(dtype)  # rounded as the scores are: the order stays


def _steps(train_MD: Tensor, mean_D: Tensor) -> Tensor:
    above_D, below_D = train_MD.amax(dim=0) - mean_D, mean_D - train_MD.amin(dim=0)
    return _step(torch.maximum(above_D, below_D))


def _step(largest: Tensor) -> Tensor:
    """Of which the largest value has as many as int8 can count."""
    return (largest / LARGEST_COUNT).clamp(min=torch.finfo(largest.dtype).tiny)


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
