"""The Pi-model (Laine & Aila, 2016, https://arxiv.org/abs/1610.02242)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, InRange
from ssl_pipeline.losses import consistency_loss, pi_model_loss, weighted_cross_entropy
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.classifier import ClassifierPair, accuracy
from ssl_pipeline.schedule import Duration, Progress, Schedule


class PiModelConfig(Config):
    """Pi-model: a classifier says the same of two views of an image."""

    name: Literal["pi_model"]
    num_classes: int | None = Field(None, gt=1, le=2**20)
    """Classes of the labelled images; null takes as many as their shards have."""
    form: Literal["authors", "detached"] = "authors"
    """authors: all images count, both branches learn, and the loss on labels is divided by all images. detached
    (Google, USB): unlabelled images alone, the second branch is a target, the loss on labels is the mean of theirs."""
    consistency_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(
        value=8.0, delay=Duration("1ep"), warmup=Duration("79ep"), rise="exponential"
    )
    """Weight of the consistency; the authors' is 100 * labelled / all images: 8 with 4,000 of CIFAR-10."""
    teacher_momentum: Annotated[Schedule, InRange(ge=0, le=1)] = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps; the authors have none: 0."""


class PiModel(Method):
    """A backbone with a linear classifier; its moving average, batch-norm statistics copied, is what is evaluated."""

    config_class = PiModelConfig
    needs = (Views("weak", count=2, evaluated=True), Views("weak", count=2, labelled=True))

    def __init__(self, config: PiModelConfig, backbone: Backbone) -> None:
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
        labels, weight = batch.labelled.labels, self.config.consistency_weight(progress)
        features, logits = self.pair(*batch.labelled.two("weak"), *batch.two("weak"))
        labelled, labelled_again, first, second = logits
        if self.config.form == "authors":
            classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
            known = torch.cat([classes, classes.new_full((len(first),), -1)])
            branches = torch.cat([labelled, first]), torch.cat([labelled_again, second])
            loss = pi_model_loss(*branches, known, consistency_weight=weight)
        else:
            loss = weighted_cross_entropy(labelled, labels) + weight * consistency_loss(first, second)
        metrics = {
            "consistency": consistency_loss(first.detach(), second),
            "labelled_accuracy": accuracy(labelled, labels),
            "unlabelled_right": accuracy(first, batch.labels),
            "feature_std": feature_std(features.detach()),
        }
        return StepOutput(loss, metrics)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.pair.update(self.config.teacher_momentum(progress))
