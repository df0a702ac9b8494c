"""The step that FixMatch and its successors share: weak views guess the classes of strong ones."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ssl_pipeline.batch import Batch
from ssl_pipeline.losses import weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.modules.classifier import ClassifierPair, are_right
from ssl_pipeline.modules.pseudo_labels import PseudoLabels

Regularizer = Callable[[Tensor, PseudoLabels], Tensor]


def weak_to_strong(
    pair: ClassifierPair,
    weighting: nn.Module,
    batch: Batch,
    *,
    unlabelled_weight: float,
    regularizer: Regularizer | None = None,
) -> StepOutput:
    """Cross-entropy on the labels + unlabelled_weight * that of the strong views on the classes and weights guessed.

    In one pass, so that batch norm sees one distribution. weighting: one of `modules.pseudo_labels`, which also says
    what `after_step` wants to have. regularizer: added to the loss, of the strong views' logits and the guesses.
    """
    assert batch.labelled is not None
    labels = batch.labelled.labels
    parts = (batch.labelled.one("weak"), batch.one("weak"), batch.one("strong"))
    features, (labelled, weak, strong) = pair(*parts)
    guessed: PseudoLabels = weighting(weak, labelled, batch.sample_ids)
    unlabelled_loss = weighted_cross_entropy(strong, guessed.targets, guessed.weights)
    loss = weighted_cross_entropy(labelled, labels) + unlabelled_weight * unlabelled_loss
    if regularizer is not None:
        loss = loss + regularizer(strong, guessed)
    metrics = {
        **guessed.metrics,
        "kept_right": (guessed.weights * are_right(guessed.targets, batch.labels)).float().mean(),
        "labelled_accuracy": are_right(labelled.argmax(dim=1), labels).float().mean(),
        "feature_std": feature_std(features.detach()),
    }
    return StepOutput(loss, metrics, guessed.carry)
