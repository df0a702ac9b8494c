"""FreeMatch (Wang et al., 2022, https://arxiv.org/abs/2205.07246)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, InRange
from ssl_pipeline.losses import fairness_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.classifier import ClassifierPair
from ssl_pipeline.modules.pseudo_labels import SelfAdaptiveThresholds
from ssl_pipeline.modules.weak_to_strong import weak_to_strong
from ssl_pipeline.schedule import Progress, Schedule


class FreeMatchConfig(Config):
    """FreeMatch: FixMatch with thresholds for each class that follow the confidence, and a fairness term."""

    name: Literal["freematch"]
    num_classes: int | None = Field(None, gt=1, le=2**20)
    """Classes of the labelled images; null takes as many as their shards have."""
    statistics_momentum: float = Field(0.999, ge=0, lt=1)
    """Share of the moving means of confidence and predictions that an update keeps."""
    fairness_weight: float = Field(0.01, ge=0)
    """Weight of the fairness term (TorchSSL; USB's files: 0.001)."""
    threshold_limits: Annotated[tuple[float, float], InRange(ge=0, le=1, increasing=True)] | None = None
    """What the thresholds are clamped to; [0.9, 0.95] for SVHN."""
    unlabelled_weight: float = Field(1.0, ge=0)
    """Weight of the loss on pseudo-labels beside the loss on labels."""
    teacher_momentum: Annotated[Schedule, InRange(ge=0, le=1)] = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps."""


class FreeMatch(Method):
    """A backbone with a linear classifier; its moving average, batch-norm statistics copied, is what is evaluated."""

    config_class = FreeMatchConfig
    coupled_by = "the fairness of classes"
    needs = (
        Views("weak", count=1, evaluated=True),
        Views("strong", count=1),
        Views("weak", count=1, labelled=True),
    )

    def __init__(self, config: FreeMatchConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.pair = ClassifierPair(backbone, config.num_classes)

    def prepare(self, facts: RunFacts) -> None:
        config = self.config
        num_classes = self.pair.prepare(facts, config.num_classes, one_pass=("weak", "strong"))
        self.weighting = SelfAdaptiveThresholds(
            num_classes, momentum=config.statistics_momentum, limits=config.threshold_limits
        )

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
        carry, weighting = step.labels.carry, self.weighting
        predictions = weighting.predictions.after(carry["predictions"])
        guesses = weighting.guesses.after(carry["guesses"])
        fairness = fairness_loss(step.strong, step.labels.weights, predictions, guesses)
        loss = step.loss + self.config.fairness_weight * fairness
        return StepOutput(loss, {**metrics, "fairness": fairness.detach()}, carry)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.weighting.after_step(carries)
        self.pair.update(self.config.teacher_momentum(progress))
