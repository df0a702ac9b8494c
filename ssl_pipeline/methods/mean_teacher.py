"""Mean Teacher (Tarvainen & Valpola, 2017, https://arxiv.org/abs/1703.01780)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.config import InRange
from ssl_pipeline.losses import consistency_loss, weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import TWO_WEAK, FewLabels, FewLabelsConfig
from ssl_pipeline.modules.classifier import accuracy
from ssl_pipeline.modules.teacher import averaging_momentum
from ssl_pipeline.schedule import Duration, Momentum, Progress, Schedule


class MeanTeacherConfig(FewLabelsConfig):
    """Mean Teacher: a classifier agrees with its moving average, which sees another view of each image."""

    name: Literal["mean_teacher"]
    consistency: Literal["mse", "kl"] = "mse"
    """How student and teacher are compared: squared error of the probabilities, or KL(teacher || student)."""
    consistency_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(
        value=100.0, warmup=Duration("5ep"), rise="exponential"
    )
    """Weight of the consistency relative to the loss on labels."""
    consistency_on: Literal["all", "unlabelled"] = "all"
    """Whose consistency counts: all images (the authors), or only the unlabelled ones (Google, USB)."""
    teacher_momentum: Momentum = Schedule(value=0.99)
    """Share of the teacher that an update keeps, once it has seen enough: a true average at first."""


class MeanTeacher(FewLabels):
    """Its moving average, which is evaluated, is its teacher too.

    The teacher has batch-norm statistics of its own, of the second views. The loss on labels is the mean over labelled
    images; the authors' PyTorch code divides its sum by all images, so that weights there are smaller by that ratio.
    """

    config_class = MeanTeacherConfig
    config: MeanTeacherConfig
    needs = TWO_WEAK

    def __init__(self, config: MeanTeacherConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone, buffers="own")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        assert batch.labelled is not None
        labels = batch.labelled.labels
        pairs = (batch.labelled.two("weak"), batch.two("weak"))
        first, second = ([views[number] for views in pairs] for number in (0, 1))
        features, logits = self.pair(*first)
        student, teacher = torch.cat(logits), self.pair.teacher(torch.cat(second))
        counted = slice(len(labels) if self.config.consistency_on == "unlabelled" else 0, None)
        consistency = consistency_loss(student[counted], teacher[counted], distance=self.config.consistency)
        weight = self.config.consistency_weight(progress)
        loss = weighted_cross_entropy(logits[0], labels) + weight * consistency
        metrics = {
            "consistency": consistency.detach(),
            "labelled_accuracy": accuracy(logits[0], labels),
            "teacher_right": accuracy(teacher[len(labels) :], batch.labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        return StepOutput(loss, metrics)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        limit = self.config.teacher_momentum(progress)
        self.pair.update(averaging_momentum(progress, limit=limit))
