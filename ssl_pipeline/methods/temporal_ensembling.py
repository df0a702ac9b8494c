"""Temporal Ensembling (Laine & Aila, 2016, https://arxiv.org/abs/1610.02242)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.config import InRange
from ssl_pipeline.distributed import gather
from ssl_pipeline.losses import probability_error, weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import WEAK, FewLabels, FewLabelsConfig
from ssl_pipeline.modules.classifier import accuracy
from ssl_pipeline.modules.image_memory import TemporalEnsemble
from ssl_pipeline.schedule import Duration, Progress, Schedule


class TemporalEnsemblingConfig(FewLabelsConfig):
    """Temporal Ensembling: a classifier agrees with the moving mean of what it said of an image in earlier epochs."""

    name: Literal["temporal_ensembling"]
    ensemble_momentum: float = Field(0.6, ge=0, lt=1)
    """Share of an image's mean prediction that a visit keeps."""
    consistency_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(
        value=30.0, delay=Duration("1ep"), warmup=Duration("79ep"), rise="exponential"
    )
    """Weight of the distance to the ensemble relative to the mean loss on labels. The authors' 30: they multiply both
    by labelled / all images. CIFAR-100: 100."""


class TemporalEnsembling(FewLabels):
    """Its ensemble remembers the images of data.shards, by their number in the set.

    A prediction is taken in after the step that made it. An image that was not seen yet has no target.
    """

    config_class = TemporalEnsemblingConfig
    config: TemporalEnsemblingConfig
    needs = WEAK

    def prepare(self, facts: RunFacts) -> None:
        num_classes = self.learn_classes(facts)
        self.ensemble = TemporalEnsemble(facts.num_images, num_classes, momentum=self.config.ensemble_momentum)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        assert batch.labelled is not None
        labels = batch.labelled.labels
        features, (labelled, logits) = self.pair(batch.labelled.one("weak"), batch.one("weak"))
        targets, seen = self.ensemble.targets(batch.sample_ids), self.ensemble.visits[batch.sample_ids] > 0
        distance = probability_error(logits, targets, seen)
        loss = weighted_cross_entropy(labelled, labels) + self.config.consistency_weight(progress) * distance
        metrics = {
            "consistency": distance.detach(),
            "target_right": accuracy(targets, batch.labels),
            "labelled_accuracy": accuracy(labelled, labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        carry = {"sample_ids": batch.sample_ids, "predictions": logits.detach().softmax(dim=1)}
        return StepOutput(loss, metrics, carry)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        # all rows of the step at once: an image that comes twice is one visit
        sample_ids, predictions = (
            torch.cat([gather(carry[name]) for carry in carries]) for name in ("sample_ids", "predictions")
        )
        self.ensemble.update(sample_ids, predictions)
        super().after_step(carries, progress)
