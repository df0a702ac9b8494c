"""FixMatch (Sohn et al., 2020, https://arxiv.org/abs/2001.07685)."""

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
from ssl_pipeline.modules.pseudo_labels import FixedThreshold
from ssl_pipeline.modules.weak_to_strong import weak_to_strong
from ssl_pipeline.schedule import Progress, Schedule


class FixMatchConfig(Config):
    """FixMatch: what a classifier says with confidence of a weakly augmented image is the label of a strong view."""

    name: Literal["fixmatch"]
    num_classes: int | None = Field(None, gt=1, le=2**20)
    """Classes of the labelled images; null takes as many as their shards have."""
    threshold: float = Field(0.95, ge=0, le=1)
    """Smallest probability of a class that makes it a pseudo-label."""
    unlabelled_weight: float = Field(1.0, ge=0)
    """Weight of the loss on pseudo-labels beside the loss on labels."""
    teacher_momentum: Annotated[Schedule, InRange(ge=0, le=1)] = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps."""


class FixMatch(Method):
    """A backbone with a linear classifier; its moving average, batch-norm statistics copied, is what is evaluated.

    The moving average takes no part in training. Unlabelled images may come with labels: these serve the metrics alone.
    """

    config_class = FixMatchConfig
    needs = (
        Views("weak", count=1, evaluated=True),
        Views("strong", count=1),
        Views("weak", count=1, labelled=True),
    )

    def __init__(self, config: FixMatchConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.pair = ClassifierPair(backbone, config.num_classes)
        self.weighting = FixedThreshold(threshold=config.threshold)

    def prepare(self, facts: RunFacts) -> None:
        self.pair.prepare(facts, self.config.num_classes, one_pass=("weak", "strong"))

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
