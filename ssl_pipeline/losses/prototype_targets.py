"""Target rows over prototypes that are never whole: made in slabs of prototypes from a teacher's rows.

By centring as DINO (Caron et al., 2021, https://arxiv.org/abs/2104.14294) or by Sinkhorn-Knopp as SwAV (Caron et al.,
2020, https://arxiv.org/abs/2006.09882), DINOv2 and DINOv3: either way a softmax of logits, each prototype's shifted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssl_pipeline.distributed import gather, world_size
from ssl_pipeline.losses.assignment import balancing_shift, check_sinkhorn
from ssl_pipeline.losses.checks import check_positive
from ssl_pipeline.losses.precision import matmul_dtype, sum_dtype

# Axes: M target rows, D dimensions, K prototypes, k those of one slab; A equal parts of the rows, Q rows of a queue.
ROWS_TO_COUNT = 64  # for a metric; 32 take 8 % of the time of a loss of 160 rows, 65,536 prototypes, one core
SLAB = 8192  # 160 rows on one core: 2,048 to 16,384 prototypes are alike, 65,536 (all at once) take 1.5x the time


@dataclass(frozen=True)
class PrototypeTargets:
    """Target rows softmax(rows @ prototypes.T / temperature + shift); nothing in them receives a gradient.

    rows: (M, D). prototypes: (K, D). shifts: (A, K), one for each of A equal parts of the rows.
    """

    rows: Tensor
    prototypes: Tensor
    shifts: Tensor
    temperature: float

    def logits(self, slab: slice) -> Tensor:
        """(M, k), newly allocated: the caller may change it in place."""
        products_AMk = (self.rows @ self.prototypes[slab].T).unflatten(0, (len(self.shifts), -1))
        return torch.add(self.shifts[:, None, slab], products_AMk, alpha=1 / self.temperature).flatten(0, 1)

    def detached(self, dtype: torch.dtype) -> PrototypeTargets:
        """The same without gradient, rows and prototypes in `dtype`."""
        rows_MD, prototypes_KD = (tensor.detach().to(dtype) for tensor in (self.rows, self.prototypes))
        shifts_AK = self.shifts.detach().to(sum_dtype(self.rows))
        return replace(self, rows=rows_MD, prototypes=prototypes_KD, shifts=shifts_AK)


def centred_targets(
    rows_MD: Tensor, prototypes_KD: Tensor, centre_K: Tensor, *, temperature: float
) -> PrototypeTargets:
    """DINO's targets: `centred_softmax(rows @ prototypes.T, centre, temperature=temperature)`."""
    check_positive("centred_targets", temperature=temperature)
    return PrototypeTargets(rows_MD, prototypes_KD, -centre_K[None] / temperature, temperature)


@torch.no_grad()
def sinkhorn_targets(
    rows_MD: Tensor,
    prototypes_KD: Tensor,
    *,
    epsilon: float,
    num_iterations: int,
    num_parts: int = 1,
    queues_AQD: Tensor | None = None,
) -> PrototypeTargets:
    """`sinkhorn_knopp(rows @ prototypes.T, ...)` over the rows of all processes, which may bring different numbers.

    num_parts: into how many equal parts the rows are cut, each balanced on its own: 1 for DINOv2 and DINOv3, the number
        of assigned crops for SwAV.
    queues_AQD: older rows (num_parts, Q, D) that are balanced together with each part, and then dropped.

    Raises ValueError as `sinkhorn_knopp`, or if rows or queues do not come in `num_parts` parts.
    """
    check_sinkhorn(epsilon, num_iterations)
    if num_parts < 1 or len(rows_MD) % num_parts or (queues_AQD is not None and len(queues_AQD) != num_parts):
        raise ValueError(
            f"sinkhorn_targets needs rows in num_parts={num_parts} equal parts, with a queue for each or none. "
            f"Got {len(rows_MD)} rows and {'no' if queues_AQD is None else len(queues_AQD)} queues."
        )
    unshifted_AK = prototypes_KD.new_zeros(1, len(prototypes_KD), dtype=sum_dtype(rows_MD))
    slabs = slabs_of(len(prototypes_KD), SLAB)  # the same on every process, whatever its rows
    shifts = []
    for part, rows_BD in enumerate(rows_MD.unflatten(0, (num_parts, -1))):
        balanced_ND = rows_BD if queues_AQD is None else torch.cat([queues_AQD[part].to(rows_BD.dtype), rows_BD])
        balanced = PrototypeTargets(balanced_ND, prototypes_KD, unshifted_AK, epsilon).detached(matmul_dtype(rows_MD))
        with torch.autocast(rows_MD.device.type, enabled=False):
            shifts.append(balancing_shift(balanced.logits, slabs, num_iterations=num_iterations))
    return PrototypeTargets(rows_MD, prototypes_KD, torch.stack(shifts), epsilon)


@torch.no_grad()
def prototypes_used(targets: PrototypeTargets) -> Tensor:
    """How many different prototypes are the likeliest ones of the first 64 target rows (of the first part), as a share.

    1 if each row has a prototype of its own (or all prototypes are in use), near 0 if nearly all prototypes are dead.
    The rows are those of all processes, an equal share of each.
    """
    num_rows = min(len(targets.rows) // len(targets.shifts), math.ceil(ROWS_TO_COUNT / world_size()))
    few = replace(targets, rows=targets.rows[:num_rows], shifts=targets.shifts[:1])
    num_prototypes = len(targets.prototypes)
    of_slabs = [few.logits(slab).max(dim=1) for slab in slabs_of(num_prototypes, SLAB)]
    values_SM = torch.stack([best.values for best in of_slabs])
    indices_SM = torch.stack([best.indices + SLAB * number for number, best in enumerate(of_slabs)])
    likeliest_M = indices_SM.gather(0, values_SM.argmax(dim=0, keepdim=True))[0]
    likeliest_M = gather(likeliest_M).sort().values
    different = 1 + (likeliest_M[1:] != likeliest_M[:-1]).sum()
    return different / min(len(likeliest_M), num_prototypes)


def slabs_of(num_prototypes: int, width: int) -> list[slice]:
    """The prototypes in slabs of `width`, the last one what is left."""
    return [slice(start, min(start + width, num_prototypes)) for start in range(0, num_prototypes, width)]
