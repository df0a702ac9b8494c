"""How a batch is assigned to prototypes: a teacher's probabilities by centring or by Sinkhorn-Knopp.

Centring is DINO's (Caron et al., 2021, https://arxiv.org/abs/2104.14294), Sinkhorn-Knopp that of SwAV (Caron et al.,
2020, https://arxiv.org/abs/2006.09882; Cuturi, 2013, https://arxiv.org/abs/1306.0895), DINOv2 and DINOv3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.distributed import logsumexp_over_ranks
from ssl_pipeline.losses.checks import check_positive
from ssl_pipeline.losses.precision import float32

# Axes: N rows of this process, K prototypes, k those of one slab.


@float32
def centred_softmax(logits: Tensor, centre: Tensor, *, temperature: float) -> Tensor:
    """DINO's teacher probabilities, softmax((logits - centre) / temperature) over the last axis.

    Shapes: logits (..., K), centre (K,) or (1, K). Raises ValueError unless temperature > 0.
    """
    check_positive("centred_softmax", temperature=temperature)
    return F.softmax((logits - centre) / temperature, dim=-1)


@float32
@torch.no_grad()
def sinkhorn_knopp(scores_NK: Tensor, *, epsilon: float, num_iterations: int) -> Tensor:
    """Codes (N, K) that give each row to prototypes, and each prototype about as much of the batch; no gradient.

    With Q = exp(scores / epsilon) over the rows of all processes, `num_iterations` times: divide each column by its sum
    and by K, then each row by its sum and by the number of rows; at the end times the number of rows. Rows sum to 1,
    columns nearly to N / K. Processes may bring different numbers of rows; each gets the codes of its own. Computed in
    logarithms, so no score is too large. Raises ValueError unless epsilon > 0 and num_iterations >= 1.
    """
    if scores_NK.ndim != 2:
        raise ValueError(f"sinkhorn_knopp needs scores of shape (N, K). Got {tuple(scores_NK.shape)}.")
    check_sinkhorn(epsilon, num_iterations)
    logits_NK = scores_NK / epsilon
    whole = [slice(0, logits_NK.shape[1])]
    shift_K = balancing_shift(lambda slab: logits_NK[:, slab], whole, num_iterations=num_iterations)
    return F.softmax(logits_NK + shift_K, dim=1)


def balancing_shift(logits_of: Callable[[slice], Tensor], slabs: Sequence[slice], *, num_iterations: int) -> Tensor:
    """(K,): what Sinkhorn-Knopp adds to every row of logits, so that their softmax is its codes.

    `logits_of` gives the columns (N, k) of a slab of prototypes, in units of epsilon; it is asked once per iteration.
    The codes are exp(logits) times a factor for each row and one for each column, and the last step makes each row sum
    to 1, as a softmax does; so the logarithms of the columns' factors are all there is to find. Divisors that are the
    same for all columns, or for all rows, cancel and are left out.
    """
    row_total_N: Tensor | None = None
    for _ in range(num_iterations):
        shifts, totals = [], []
        for slab in slabs:
            logits_Nk = logits_of(slab)
            scaled_Nk = logits_Nk if row_total_N is None else logits_Nk - row_total_N[:, None]
            shifts.append(-logsumexp_over_ranks(scaled_Nk.logsumexp(dim=0)))
            totals.append((logits_Nk + shifts[-1]).logsumexp(dim=1))
        row_total_N = torch.stack(totals).logsumexp(dim=0)
    return torch.cat(shifts)


def check_sinkhorn(epsilon: float, num_iterations: int) -> None:
    """Raises ValueError for settings that Sinkhorn-Knopp cannot have."""
    check_positive("sinkhorn_knopp", epsilon=epsilon, num_iterations=num_iterations)
