"""Pseudo-Label (Lee, 2013, ICML workshop on challenges in representation learning)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssl_pipeline.batch import Batch
from ssl_pipeline.config import InRange
from ssl_pipeline.losses import pseudo_label_loss, weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import WEAK, FewLabels, FewLabelsConfig
from ssl_pipeline.modules.classifier import accuracy, are_right
from ssl_pipeline.modules.running_statistics import kept_statistics
from ssl_pipeline.schedule import Duration, Progress, Schedule


class PseudoLabelConfig(FewLabelsConfig):
    """Pseudo-Label: what a classifier says with confidence of an image is its label in the same step."""

    name: Literal["pseudo_label"]
    threshold: float = Field(0.95, ge=0, le=1)
    """Smallest probability of a class that makes it a pseudo-label; the paper has none (0)."""
    unlabelled_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(value=1.0, warmup=Duration("40%"))
    """Weight of the loss on pseudo-labels; the paper's is {value: 3, delay: 100ep, warmup: 500ep}."""


class PseudoLabel(FewLabels):
    """Labelled and unlabelled images are passed one after the other; running statistics are those of the former."""

    config_class = PseudoLabelConfig
    config: PseudoLabelConfig
    needs = WEAK

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        assert batch.labelled is not None
        labels = batch.labelled.labels
        _, (labelled,) = self.pair(batch.labelled.one("weak"))
        with kept_statistics(self.pair.student):
            features, (logits,) = self.pair(batch.one("weak"))
        probabilities = logits.detach().softmax(dim=1)
        unlabelled_loss, kept = pseudo_label_loss(probabilities, logits, threshold=self.config.threshold)
        weight = self.config.unlabelled_weight(progress)
        loss = weighted_cross_entropy(labelled, labels) + weight * unlabelled_loss
        metrics = {
            "kept": kept.float().mean(),
            "kept_right": (kept * are_right(logits.argmax(dim=1), batch.labels)).float().mean(),
            "labelled_accuracy": accuracy(labelled, labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        return StepOutput(loss, metrics)
