"""Pseudo-Label (Lee, 2013, ICML workshop on challenges in representation learning)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, InRange
from ssl_pipeline.losses import pseudo_label_loss, weighted_cross_entropy
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.classifier import ClassifierPair, accuracy, are_right
from ssl_pipeline.modules.running_statistics import kept_statistics
from ssl_pipeline.schedule import Duration, Progress, Schedule


class PseudoLabelConfig(Config):
    """Pseudo-Label: what a classifier says with confidence of an image is its label in the same step."""

    name: Literal["pseudo_label"]
    num_classes: int | None = Field(None, gt=1, le=2**20)
    """Classes of the labelled images; null takes as many as their shards have."""
    threshold: float = Field(0.95, ge=0, le=1)
    """Smallest probability of a class that makes it a pseudo-label; the paper has none (0)."""
    unlabelled_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(value=1.0, warmup=Duration("40%"))
    """Weight of the loss on pseudo-labels; the paper's is {value: 3, delay: 100ep, warmup: 500ep}."""
    teacher_momentum: Annotated[Schedule, InRange(ge=0, le=1)] = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps."""


class PseudoLabel(Method):
    """A backbone with a linear classifier; its moving average, batch-norm statistics copied, is what is evaluated.

    Labelled and unlabelled images are passed one after the other; running statistics are those of the labelled ones.
    """

    config_class = PseudoLabelConfig
    needs = (Views("weak", count=1, evaluated=True), Views("weak", count=1, labelled=True))

    def __init__(self, config: PseudoLabelConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.pair = ClassifierPair(backbone, config.num_classes)

    def prepare(self, facts: RunFacts) -> None:
        self.pair.prepare(facts, self.config.num_classes, one_pass=("weak",))

    def backbones(self) -> dict[str, Backbone]:
        return self.pair.backbones()

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]
        """The moving average's."""
        return self.pair.classifier

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
            "feature_std": feature_std(features.detach()),
        }
        return StepOutput(loss, metrics)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.pair.update(self.config.teacher_momentum(progress))
