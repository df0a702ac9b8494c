"""Losses of UDA (Xie et al., 2019, https://arxiv.org/abs/1904.12848) and FreeMatch (Wang et al., 2022,
https://arxiv.org/abs/2205.07246) in addition to the cross-entropy on pseudo-labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.distributed import gather, gather_with_grad, mean_over_ranks, world_size
from ssl_pipeline.losses.checks import check_positive, check_same_logits
from ssl_pipeline.losses.precision import float32

# Axes: B labelled images, U unlabelled ones, C classes.


@float32
def uda_loss(
    weak_logits: Tensor, strong_logits: Tensor, *, threshold: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """UDA's unlabelled term, and which images are kept, (U,) bool (Xie et al., 2019, https://arxiv.org/abs/1904.12848).

    Shapes: both (U, C), row i of both from image i.

        kept[i] = max_c softmax(weak[i])[c] > threshold
        loss = mean over *all* U of  kept[i] * KL(softmax(weak[i] / temperature) || softmax(strong[i]))

    Only the strong views receive a gradient.
    """
    check_same_logits("uda_loss", weak_logits=weak_logits, strong_logits=strong_logits)
    check_positive("uda_loss", temperature=temperature)
    weak_logits = weak_logits.detach()
    kept_U = F.softmax(weak_logits, dim=1).amax(dim=1) > threshold
    sharp_UC = F.log_softmax(weak_logits / temperature, dim=1)
    divergence_U = (sharp_UC.exp() * (sharp_UC - F.log_softmax(strong_logits, dim=1))).sum(dim=1)
    return (divergence_U * kept_U).mean(), kept_U


@float32
def annealed_cross_entropy(logits_BC: Tensor, labels_B: Tensor, *, limit: float) -> Tensor:
    """UDA's training-signal annealing: labelled rows that are known too well for now drop out.

    Shapes: logits (B, C), labels (B,) int64.

        kept[i] = softmax(logits[i])[labels[i]] <= limit
        loss = sum of kept[i] * CE(logits[i], labels[i]) / max(number of kept rows, 1),  both over all processes
    """
    if logits_BC.ndim != 2 or len(logits_BC) == 0 or labels_B.shape != logits_BC.shape[:1]:
        raise ValueError(
            "annealed_cross_entropy needs logits (B, C) and labels (B,), B >= 1. "
            f"Got {tuple(logits_BC.shape)} and {tuple(labels_B.shape)}."
        )
    losses_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
    kept_B = (-losses_B.detach()).exp() <= limit
    kept_per_process = mean_over_ranks(kept_B.to(losses_B.dtype).sum())
    return (losses_B * kept_B).sum() / kept_per_process.clamp(min=1 / world_size())


@float32
def fairness_loss(strong_logits_UC: Tensor, kept_U: Tensor, predictions_C: Tensor, guesses_C: Tensor) -> Tensor:
    """FreeMatch's fairness term: strong views predict the classes as often as weak ones did until now (Wang et al.,
    2022, https://arxiv.org/abs/2205.07246, equation 11).

    Shapes: strong_logits (U, C), kept (U,) bool; predictions and guesses (C,), moving means of the weak views'
    probabilities and of their argmax. With q the sum of the strong views' probabilities and k how often each class is
    their argmax, both of the kept rows of all processes, and norm dividing by the sum, x / 0 := 0:

        sum_c a_c log(b_c + 1e-12),  a = norm(predictions / guesses),  b = norm(q / k)

    Only q receives a gradient, exact on several processes. With nothing kept it is 0.
    """
    if {predictions_C.shape, guesses_C.shape} != {strong_logits_UC.shape[1:]} or kept_U.shape != strong_logits_UC.shape[
        :1
    ]:
        raise ValueError(
            "fairness_loss needs strong logits (U, C), kept (U,), predictions and guesses (C,). "
            f"Got {tuple(strong_logits_UC.shape)}, {tuple(kept_U.shape)}, {tuple(predictions_C.shape)} and "
            f"{tuple(guesses_C.shape)}."
        )
    kept_U1 = kept_U.detach().to(strong_logits_UC.dtype)[:, None]
    strong_UC = F.softmax(strong_logits_UC, dim=1)
    guessed_UC = torch.zeros_like(strong_UC).scatter_(1, strong_logits_UC.argmax(dim=1, keepdim=True), 1)
    counts_C = gather((guessed_UC * kept_U1).sum(dim=0)[None]).sum(dim=0)
    sums_C = gather_with_grad((strong_UC * kept_U1).sum(dim=0)[None]).sum(dim=0)
    shares_C = _normalised(_quotient(sums_C, counts_C))
    wanted_C = _normalised(_quotient(predictions_C.detach(), guesses_C.detach()))
    return (wanted_C * (shares_C + 1e-12).log()).sum() * (counts_C.sum() > 0)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where that is 0."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1), 0)


def _normalised(values: Tensor) -> Tensor:
    total = values.sum()
    return values / torch.where(total > 0, total, 1)
