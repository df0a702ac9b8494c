"""The step that FixMatch and its successors share: weak views guess the classes of strong ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ssl_pipeline.batch import Batch
from ssl_pipeline.losses import weighted_cross_entropy
from ssl_pipeline.modules.classifier import ClassifierPair, accuracy, are_right
from ssl_pipeline.modules.pseudo_labels import PseudoLabels


@dataclass(frozen=True)
class Guessed:
    """The loss of such a step, its metrics, and what they were made from.

    strong: logits (U, classes) of the strong views. labels: what the weak ones say of them, with the carry for
    `after_step`. features: (B + 2 U, D), detached.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    labels: PseudoLabels
    strong: Tensor
    features: Tensor


def weak_to_strong(pair: ClassifierPair, weighting: nn.Module, batch: Batch, *, unlabelled_weight: float) -> Guessed:
    """Cross-entropy on the labels + unlabelled_weight * that of the strong views on the classes and weights guessed.

    In one pass, so that batch norm sees one distribution. weighting: one of `modules.pseudo_labels`.
    """
    assert batch.labelled is not None
    labels = batch.labelled.labels
    parts = (batch.labelled.one("weak"), batch.one("weak"), batch.one("strong"))
    features, (labelled, weak, strong) = pair(*parts)
    guessed: PseudoLabels = weighting(weak, labelled, batch.sample_ids)
    unlabelled_loss = weighted_cross_entropy(strong, guessed.targets, guessed.weights)
    loss = weighted_cross_entropy(labelled, labels) + unlabelled_weight * unlabelled_loss
    metrics = {
        **guessed.metrics,
        "kept_right": (guessed.weights * are_right(guessed.targets, batch.labels)).float().mean(),
        "labelled_accuracy": accuracy(labelled, labels),
    }
    return Guessed(loss, metrics, guessed, strong, features.detach())
