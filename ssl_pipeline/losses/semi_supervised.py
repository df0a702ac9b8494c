"""Losses that join a few labels with many images, and what makes targets of predictions.

FixMatch (Sohn et al., 2020, https://arxiv.org/abs/2001.07685), MixMatch (Berthelot et al., 2019,
https://arxiv.org/abs/1905.02249), ReMixMatch (https://arxiv.org/abs/1911.09785) and AdaMatch (Berthelot et al., 2021,
https://arxiv.org/abs/2106.04732).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.distributed import mean_over_ranks
from ssl_pipeline.losses.checks import check_positive, check_same_logits
from ssl_pipeline.losses.precision import float32

# Axes: B labelled images, U unlabelled ones, N rows of any kind, C classes, V views.


@float32
def fixmatch_loss(
    labelled_logits: Tensor,
    labels: Tensor,
    weak_logits: Tensor,
    strong_logits: Tensor,
    *,
    threshold: float,
    unlabelled_weight: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the labels, and on the classes that the weak views predict with confidence for the strong ones.

    Shapes: labelled_logits (B, C), labels (B,) int64; weak_logits and strong_logits (U, C), row i of both from image i.
    Returns the loss and the boolean kept (U,) of `pseudo_label_loss`:

        mean over B of CE(labelled, labels) + unlabelled_weight * pseudo_label_loss(softmax(weak), strong)

    The weak views receive no gradient. With nothing kept the second term is 0.
    """
    if weak_logits.shape != strong_logits.shape or weak_logits.shape[1:] != labelled_logits.shape[1:]:
        raise ValueError(
            "fixmatch_loss needs weak and strong logits of one shape and as many classes as the labelled ones. "
            f"Got {tuple(weak_logits.shape)}, {tuple(strong_logits.shape)} and {tuple(labelled_logits.shape)}."
        )
    probabilities_UC = F.softmax(weak_logits.detach(), dim=1)
    unlabelled, kept = pseudo_label_loss(probabilities_UC, strong_logits, threshold=threshold)
    return weighted_cross_entropy(labelled_logits, labels) + unlabelled_weight * unlabelled, kept


@float32
def pseudo_label_loss(
    probabilities_UC: Tensor, strong_logits_UC: Tensor, *, threshold: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the strong views on the classes that are probable enough; and which images are kept, (U,) bool.

    Shapes: both (U, C), row i of both from image i. threshold: a number or a scalar; or (C,), of which the entry of the
    guessed class counts.

        kept[i] = max_c probabilities[i] >= threshold
        loss = mean over *all* U of  kept[i] * CE(strong[i], argmax_c probabilities[i])

    Only the strong views receive a gradient. FixMatch, FlexMatch and AdaMatch differ in probabilities and threshold.
    """
    check_same_logits("pseudo_label_loss", probabilities=probabilities_UC, strong_logits=strong_logits_UC)
    confidence_U, guesses_U = probabilities_UC.detach().max(dim=1)
    if isinstance(threshold, Tensor) and threshold.ndim:
        threshold = threshold[guesses_U]
    kept_U = confidence_U >= threshold
    return weighted_cross_entropy(strong_logits_UC, guesses_U, kept_U), kept_U


@float32
def weighted_cross_entropy(logits_NC: Tensor, targets: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """The mean over *all* N rows of weight * cross-entropy with the target; without weights they are 1.

    Shapes: logits (N, C); targets classes (N,) int64 or probabilities (N, C); weights (N,), numbers or bool. Only the
    logits receive a gradient. The mean over processes is that of the global batch, as long as all bring the same N.
    """
    num_rows = len(logits_NC)
    shapes = {(num_rows,), tuple(logits_NC.shape)}
    fits = num_rows > 0 and tuple(targets.shape) in shapes and (weights_N is None or weights_N.shape == (num_rows,))
    if logits_NC.ndim != 2 or not fits:
        weights = "no weights" if weights_N is None else f"weights {tuple(weights_N.shape)}"
        raise ValueError(
            "weighted_cross_entropy needs logits (N, C), targets (N,) or (N, C) and weights (N,), N >= 1. "
            f"Got {tuple(logits_NC.shape)}, {tuple(targets.shape)} and {weights}."
        )
    if weights_N is None:
        return F.cross_entropy(logits_NC, targets.detach())
    return (F.cross_entropy(logits_NC, targets.detach(), reduction="none") * weights_N.detach()).mean()


@float32
def sharpen(probabilities: Tensor, *, temperature: float) -> Tensor:
    """p^(1 / temperature) over the last axis, renormalised (MixMatch, equation 7)."""
    check_positive("sharpen", temperature=temperature)
    # over the largest first: else small ones to a high power are all 0
    powers = (probabilities / probabilities.amax(dim=-1, keepdim=True)).pow(1 / temperature)
    return powers / powers.sum(dim=-1, keepdim=True)


@float32
@torch.no_grad()
def guess_labels(logits_VUC: Tensor, *, temperature: float) -> Tensor:
    """MixMatch's targets (U, C): the mean over V views of the class probabilities, then sharpened; no gradient."""
    if logits_VUC.ndim != 3 or len(logits_VUC) == 0:
        raise ValueError(f"guess_labels needs logits (V, U, C), V >= 1. Got {tuple(logits_VUC.shape)}.")
    return sharpen(F.softmax(logits_VUC, dim=-1).mean(dim=0), temperature=temperature)


@float32
def align_distribution(probabilities_UC: Tensor, target_C: Tensor, model_C: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Probabilities whose mean is moved from the model's towards the target's (ReMixMatch, section 3.1).

        p * (target + eps) / (model + eps), rows renormalised

    Shapes: probabilities (U, C); target and model (C,), distributions over classes.
    """
    if {target_C.shape, model_C.shape} != {probabilities_UC.shape[-1:]}:
        raise ValueError(
            "align_distribution needs probabilities (U, C), target and model (C,). "
            f"Got {tuple(probabilities_UC.shape)}, {tuple(target_C.shape)} and {tuple(model_C.shape)}."
        )
    aligned_UC = probabilities_UC * ((target_C + eps) / (model_C + eps))
    return aligned_UC / aligned_UC.sum(dim=-1, keepdim=True)


@float32
@torch.no_grad()
def relative_threshold(labelled_probabilities_BC: Tensor, *, share: float) -> Tensor:
    """AdaMatch's threshold: share * the mean largest probability of the labelled rows of all processes; no gradient."""
    if labelled_probabilities_BC.ndim != 2 or len(labelled_probabilities_BC) == 0:
        raise ValueError(
            f"relative_threshold needs probabilities (B, C), B >= 1. Got {tuple(labelled_probabilities_BC.shape)}."
        )
    return share * mean_over_ranks(labelled_probabilities_BC.amax(dim=1).mean())


@float32
def interpolate_logits(joint: Tensor, alone: Tensor, draws: Tensor) -> Tensor:
    """AdaMatch's labelled logits, at random between those of the joint batch and those of only the labelled images.

    Shapes: all the same, draws uniform in [0, 1):  joint + draws * (alone - joint)
    """
    check_same_logits("interpolate_logits", joint=joint, alone=alone, draws=draws)
    return joint + draws * (alone - joint)
