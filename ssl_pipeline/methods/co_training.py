"""Co-training as cross pseudo supervision (Chen et al., 2021, https://arxiv.org/abs/2106.01226), with a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone, create_backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config
from ssl_pipeline.losses import pseudo_label_loss, weighted_cross_entropy
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.classifier import ClassifierPair, accuracy
from ssl_pipeline.schedule import Momentum, Progress, Schedule


class CoTrainingConfig(Config):
    """Co-training: two networks guess the labels that the other one learns."""

    name: Literal["co_training"]
    num_classes: int | None = Field(None, gt=1, le=2**20)
    """Classes of the labelled images; null takes as many as their shards have."""
    threshold: float = Field(0.95, ge=0, le=1)
    """Smallest probability of a class that makes it a pseudo-label; the original has none (0)."""
    unlabelled_weight: float = Field(1.0, ge=0)
    """Weight of the loss on pseudo-labels of both networks relative to their losses on labels (the original: 1.5)."""
    teacher_momentum: Momentum = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps."""


class CoTraining(Method):
    """Two backbones with linear classifiers, each with initial weights and views of its own.

    The moving average of the first, batch-norm statistics copied, is what is evaluated. A pretrained backbone is where
    both begin; their classifiers differ.
    """

    config_class = CoTrainingConfig
    needs = (
        Views("weak", count=2, evaluated=True),
        Views("strong", count=2),
        Views("weak", count=2, labelled=True),
    )

    def __init__(self, config: CoTrainingConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.pair = ClassifierPair(backbone, config.num_classes)
        self.second = ClassifierPair(create_backbone(backbone.config), config.num_classes)

    def prepare(self, facts: RunFacts) -> None:
        for pair in (self.pair, self.second):
            pair.prepare(facts, self.config.num_classes, one_pass=("weak", "strong"))

    def backbones(self) -> dict[str, Backbone]:
        others = {f"second_{name}": backbone for name, backbone in self.second.backbones().items()}
        return self.pair.backbones() | others

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]
        """That of the first network's moving average."""
        return self.pair.classifier

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        assert batch.labelled is not None
        labels = batch.labelled.labels
        groups = (batch.labelled.two("weak"), batch.two("weak"), batch.two("strong"))
        features, (labelled_1, weak_1, strong_1) = self.pair(*(views[0] for views in groups))
        _, (labelled_2, weak_2, strong_2) = self.second(*(views[1] for views in groups))
        threshold = self.config.threshold
        loss_1, kept_2 = pseudo_label_loss(weak_2.detach().softmax(dim=1), strong_1, threshold=threshold)
        loss_2, kept_1 = pseudo_label_loss(weak_1.detach().softmax(dim=1), strong_2, threshold=threshold)
        labelled_loss = weighted_cross_entropy(labelled_1, labels) + weighted_cross_entropy(labelled_2, labels)
        metrics = {
            "kept": torch.stack([kept_1, kept_2]).float().mean(),
            "agreement": accuracy(weak_1, weak_2.argmax(dim=1)),
            "unlabelled_right": accuracy(weak_1, batch.labels),
            "labelled_accuracy": accuracy(labelled_1, labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        return StepOutput(labelled_loss + self.config.unlabelled_weight * (loss_1 + loss_2), metrics)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        for pair in (self.pair, self.second):
            pair.update(self.config.teacher_momentum(progress))
