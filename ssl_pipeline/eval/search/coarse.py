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
FINEST_STEP = 2.0**-40  # of int8, where values are up to 1: float32 itself does not tell less
INT8_DIMS = range(2, 2**31 // LARGEST_COUNT**2)  # PyTorch does not multiply those of 1, and int32 must not overflow
SCORES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.int8: torch.int32}

# Axes: M training images, N queries, D feature dimensions, X rows that are rounded at once.


@dataclass(frozen=True)
class CoarseFeatures:
    """Training features in the dtype of `rows` (M, D).

    In shorter formats than float32 they are scaled to a largest value of about 1, and less about their mean: all scores
    of a query are multiplied and moved alike. In int8 a number of dimension d counts steps of `steps[d]`. `longest` is
    the largest length of a row of `rows`; `rounding` is the largest length of what a row lost, and `largest` at least
    that of a scaled row before its mean was taken off.
    """

    rows: Tensor
    steps: Tensor | None
    rounding: Tensor
    longest: Tensor
    largest: Tensor

    @classmethod
    def of(cls, train_MD: Tensor, dtype: torch.dtype) -> CoarseFeatures:
        """In float32 the features themselves: nothing is lost, nothing is copied. Raises ValueError for int8 of 1
        dimension, or of more than 133,000."""
        bytes_at_once = CACHED if train_MD.device.type == "cpu" else ROUNDED
        parts = train_MD.split(max(1, bytes_at_once // (4 * train_MD.shape[1])))
        buffers_2XD = parts[0].new_empty(2, *parts[0].shape)  # once: new memory for each part took half of the time
        scale = scale_of(torch.stack(torch.aminmax(train_MD)).abs().amax())
        if dtype == torch.float32:
            lengths = [torch.mul(rows, scale, out=buffers_2XD[0, : len(rows)]).norm(dim=1).max() for rows in parts]
            largest = torch.stack(lengths).max() / scale
            return cls(train_MD, None, largest.new_zeros(()), largest, largest)
        mean_D = train_MD[:: -(-len(train_MD) // SAMPLE)].mean(dim=0)
        steps_D = _steps(train_MD, mean_D, scale) if dtype == torch.int8 else None
        rows_MD = torch.empty_like(train_MD, dtype=dtype)
        lengths = []
        for rows, rounded in zip(parts, rows_MD.split(len(parts[0])), strict=True):
            centred, kept = buffers_2XD[:, : len(rows)]
            torch.sub(rows, mean_D, out=centred).mul_(scale)
            rounded.copy_(centred if steps_D is None else torch.div(centred, steps_D, out=kept).round_())
            kept.copy_(rounded)
            longest = kept.norm(dim=1).max()
            lost = torch.sub(centred, kept if steps_D is None else kept.mul_(steps_D), out=kept)
            lengths.append(torch.stack([longest, lost.norm(dim=1).max()]))
        longest, rounding = torch.stack(lengths).amax(dim=0)
        largest = longest * (1 if steps_D is None else steps_D.max()) + rounding + (mean_D * scale).norm()
        return cls(rows_MD, steps_D, rounding, longest, largest)

    def round_queries(self, queries_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Queries for products with `rows`, and a bound (N,) on the errors of these products, the coarse scores, before
        they are rounded themselves. Each query is scaled to a largest value of about 1, and its scores with it.

        With q, t a query and a training row and q', t' their rounded versions, |qt - q't'| = |q(t - t') + (q - q')t'|
        <= |q| |t - t'| + |q - q'| |t'|. float32's own error over D products is added, twice over. In int8 the query is
        multiplied by the steps of the rows, then counts steps of its own; scores and their errors count those.
        """
        queries_ND = queries_ND * scale_of(queries_ND.abs().amax(dim=1, keepdim=True))
        lengths_N = queries_ND.norm(dim=1)
        float32s_own = 2 * (queries_ND.shape[1] + 8) * torch.finfo(torch.float32).eps * self.largest
        error_N = lengths_N * (1.001 * self.rounding + float32s_own)
        if self.steps is None:
            rounded_ND = queries_ND.to(self.rows.dtype)
            return rounded_ND, error_N + 1.001 * (queries_ND - rounded_ND).norm(dim=1) * self.longest
        folded_ND = queries_ND * self.steps
        step_N1 = (folded_ND.abs().amax(dim=1, keepdim=True) / LARGEST_COUNT).clamp(min=FINEST_STEP**2)
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


def scale_of(largest: Tensor) -> Tensor:
    """The powers of 2 that bring these values to about 1, so that their squares are float32 numbers."""
    exponent = torch.frexp(largest).exponent.clamp(-120, 120)
    return torch.ldexp(torch.ones_like(largest), -exponent)


def lowest_scores(kth_N: Tensor, error_N: Tensor) -> Tensor:
    """The lowest coarse score that one of the k best can have, in the dtype of `kth_N`, which k coarse scores reach.

    They are off by an error at most, so that k true scores reach kth - error. The k best reach it too, and their coarse
    scores are off by another error: they reach kth - 2 error.
    """
    dtype = kth_N.dtype
    if not dtype.is_floating_point:  # exact sums
        lowest_N = (kth_N.double() - 2 * error_N.double()).ceil()
        return lowest_N.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)
    own_rounding_N = torch.finfo(dtype).eps / 2 * kth_N.float().abs()
    return (kth_N.float() - own_rounding_N - 2 * error_N).to(dtype)  # rounded as the scores are: the order stays


def _steps(train_MD: Tensor, mean_D: Tensor, scale: Tensor) -> Tensor:
    """The finest steps (D,) of which int8 counts enough for all values of a dimension."""
    if train_MD.shape[1] not in INT8_DIMS:
        raise ValueError(f"int8 takes {INT8_DIMS[0]} to {INT8_DIMS[-1]} dimensions. Got {train_MD.shape[1]}.")
    above_D, below_D = train_MD.amax(dim=0) - mean_D, mean_D - train_MD.amin(dim=0)
    return (torch.maximum(above_D, below_D) * scale / LARGEST_COUNT).clamp(min=FINEST_STEP)


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
