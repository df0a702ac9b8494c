"""The step that FixMatch and its successors share: weak views guess the classes of strong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.batch import Batch
from ssl_pipeline.losses import weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import WEAK_AND_STRONG, FewLabels, FewLabelsConfig
from ssl_pipeline.modules.classifier import accuracy, are_right
from ssl_pipeline.modules.pseudo_labels import PseudoLabels, Weighting
from ssl_pipeline.schedule import Progress


class WeakToStrongConfig(FewLabelsConfig):
    """The settings that all of these methods have."""

    unlabelled_weight: float = Field(1.0, ge=0)
    """Weight of the loss on pseudo-labels relative to the loss on labels."""


@dataclass(frozen=True)
class Guessed:
    """The loss of such a step, its metrics, and what they were made from.

    strong: logits (U, classes) of the strong views. labels: what the weak ones say of them, with the carry for
    `after_step`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    labels: PseudoLabels
    strong: Tensor


class WeakToStrong(FewLabels):
    """Cross-entropy on the labels + unlabelled_weight * that of strong views on the classes and weights guessed.

    The moving average takes no part in training. Unlabelled images may come with labels: these are used only for
    metrics.
    """

    config: WeakToStrongConfig
    needs = WEAK_AND_STRONG
    weighting: Weighting
    """Made by `__init__`, or by `prepare` where it counts images or classes."""

    def guess(self, batch: Batch, progress: Progress) -> Guessed:
        """The step, in one pass, so that batch norm sees one distribution."""
        assert batch.labelled is not None
        labels = batch.labelled.labels
        parts = (batch.labelled.one("weak"), batch.one("weak"), batch.one("strong"))
        features, (labelled, weak, strong) = self.pair(*parts)
        guessed: PseudoLabels = self.weighting(weak, labelled, batch.sample_ids)
        unlabelled_loss = weighted_cross_entropy(strong, guessed.targets, guessed.weights)
        loss = weighted_cross_entropy(labelled, labels) + self.config.unlabelled_weight * unlabelled_loss
        metrics = {
            **guessed.metrics,
            "kept_right": (guessed.weights * are_right(guessed.targets, batch.labels)).float().mean(),
            "labelled_accuracy": accuracy(labelled, labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        return Guessed(loss, metrics, guessed, strong)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        step = self.guess(batch, progress)
        return StepOutput(step.loss, step.metrics, step.labels.carry)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.weighting.after_step(carries)
        super().after_step(carries, progress)
