"""SoftMatch (Chen et al., 2023, https://arxiv.org/abs/2301.10921)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, InRange
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.classifier import ClassifierPair
from ssl_pipeline.modules.pseudo_labels import GaussianWeights
from ssl_pipeline.modules.weak_to_strong import weak_to_strong
from ssl_pipeline.schedule import Progress, Schedule


class SoftMatchConfig(Config):
    """SoftMatch: FixMatch in which every guess counts, the less the further its confidence lies below the mean."""

    name: Literal["softmatch"]
    num_classes: int | None = Field(None, gt=1, le=2**20)
    """Classes of the labelled images; null takes as many as their shards have."""
    statistics_momentum: float = Field(0.999, ge=0, lt=1)
    """Share of the moving mean and variance of the confidence that an update keeps."""
    num_sigmas: float = Field(2.0, gt=0, le=1000)
    """By how many standard deviations the weights fall to exp(-1/2): of the variance / num_sigmas^2."""
    unlabelled_weight: float = Field(1.0, ge=0)
    """Weight of the loss on pseudo-labels beside the loss on labels."""
    teacher_momentum: Annotated[Schedule, InRange(ge=0, le=1)] = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps."""


class SoftMatch(Method):
    """A backbone with a linear classifier; its moving average, batch-norm statistics copied, is what is evaluated."""

    config_class = SoftMatchConfig
    coupled_by = "the distribution of classes"
    needs = (
        Views("weak", count=1, evaluated=True),
        Views("strong", count=1),
        Views("weak", count=1, labelled=True),
    )

    def __init__(self, config: SoftMatchConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.pair = ClassifierPair(backbone, config.num_classes)

    def prepare(self, facts: RunFacts) -> None:
        config = self.config
        num_classes = self.pair.prepare(facts, config.num_classes, one_pass=("weak", "strong"))
        self.weighting = GaussianWeights(num_classes, momentum=config.statistics_momentum, num_sigmas=config.num_sigmas)

    def backbones(self) -> dict[str, Backbone]:
        return self.pair.backbones()

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]
        """The moving average's."""
        return self.pair.classifier

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        weight = self.config.unlabelled_weight
        step = weak_to_strong(self.pair, self.weighting, batch, unlabelled_weight=weight)
        metrics = {**step.metrics, "feature_std": feature_std(step.features)}
        return StepOutput(step.loss, metrics, step.labels.carry)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.weighting.after_step(carries)
        self.pair.update(self.config.teacher_momentum(progress))
