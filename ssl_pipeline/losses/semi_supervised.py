"""Losses that join a few labels with many images (FixMatch, Sohn et al., 2020, https://arxiv.org/abs/2001.07685)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.losses.precision import float32


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

    Shapes: labelled_logits (B, classes), labels (B,) int64; weak_logits and strong_logits (U, classes), row i of both
    from image i. Returns the loss and the boolean kept (U,):

        kept[i] = max softmax(weak[i]) >= threshold
        loss = mean over B of CE(labelled, labels)
               + unlabelled_weight * mean over all U of kept[i] * CE(strong[i], argmax weak[i])

    The weak views receive no gradient. With nothing kept the second term is 0.
    """
    if weak_logits.shape != strong_logits.shape or weak_logits.shape[1:] != labelled_logits.shape[1:]:
        raise ValueError(
            "fixmatch_loss needs weak and strong logits of one shape and as many classes as the labelled ones. "
            f"Got {tuple(weak_logits.shape)}, {tuple(strong_logits.shape)} and {tuple(labelled_logits.shape)}."
        )
    confidence, guess = F.softmax(weak_logits.detach(), dim=1).max(dim=1)
    kept = confidence >= threshold
    unlabelled = (F.cross_entropy(strong_logits, guess, reduction="none") * kept).mean()
    return F.cross_entropy(labelled_logits, labels) + unlabelled_weight * unlabelled, kept
