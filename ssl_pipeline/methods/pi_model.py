"""The Pi-model (Laine & Aila, 2016, https://arxiv.org/abs/1610.02242)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.config import InRange
from ssl_pipeline.losses import consistency_loss, pi_model_loss, weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import TWO_WEAK, FewLabels, FewLabelsConfig
from ssl_pipeline.modules.classifier import accuracy
from ssl_pipeline.schedule import Duration, Momentum, Progress, Schedule


class PiModelConfig(FewLabelsConfig):
    """Pi-model: a classifier says the same of two views of an image."""

    name: Literal["pi_model"]
    form: Literal["authors", "detached"] = "authors"
    """authors: all images count, both branches learn, the loss on labels is divided by all images, and soft labels are
    learnt as their likeliest class. detached
    (Google, USB): only unlabelled images, the second branch is a target, the loss on labels is the mean of theirs."""
    consistency_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(
        value=8.0, delay=Duration("1ep"), warmup=Duration("79ep"), rise="exponential"
    )
    """Weight of the consistency; the authors' is 100 * labelled / all images: 8 with 4,000 of CIFAR-10."""
    teacher_momentum: Momentum = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps; the authors have none: 0."""


class PiModel(FewLabels):
    """Its loss compares two views of every image; the moving average takes no part in training."""

    config_class = PiModelConfig
    config: PiModelConfig
    needs = TWO_WEAK

    def __init__(self, config: PiModelConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.hardens_labels = config.form == "authors"

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
            "feature_std": feature_std(features.detach(), progress),
        }
        return StepOutput(loss, metrics)
