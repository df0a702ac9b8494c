"""AdaMatch (Berthelot et al., 2021, https://arxiv.org/abs/2106.04732)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import InRange
from ssl_pipeline.losses import interpolate_logits, weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import FewLabels, FewLabelsConfig
from ssl_pipeline.modules.batch_mixing import draw_global
from ssl_pipeline.modules.classifier import accuracy, are_right
from ssl_pipeline.modules.pseudo_labels import RelativeThreshold
from ssl_pipeline.modules.running_statistics import kept_statistics
from ssl_pipeline.schedule import Duration, Progress, Schedule


class AdaMatchConfig(FewLabelsConfig):
    """AdaMatch: FixMatch for labelled and unlabelled images that may be of different domains."""

    name: Literal["adamatch"]
    threshold: float = Field(0.9, ge=0, le=1)
    """Share of the mean confidence on labelled images that a guess must reach (USB: 0.95)."""
    distribution_momentum: float = Field(0.999, ge=0, lt=1)
    """Share of the moving mean of the labelled images' predictions that an update keeps."""
    distribution_window: int | None = Field(128, ge=1, le=2**20)
    """Batches over which the unlabelled images' predictions are averaged; null: a moving mean (USB)."""
    interpolate: bool = True
    """Whether labelled logits are drawn between those of the joint batch and of only the labelled images (USB: no)."""
    labelled_strong: bool = True
    """Whether the labels are learnt on strong views too (USB: no)."""
    unlabelled_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(value=1.0, warmup=Duration("50%"), rise="cosine")
    """Weight of the loss on pseudo-labels relative to the loss on labels (USB: 1 throughout)."""


class AdaMatch(FewLabels):
    """Its running statistics are those of the joint batch, in which labelled and unlabelled images may differ."""

    config_class = AdaMatchConfig
    config: AdaMatchConfig
    coupled_by = "the relative threshold and the distribution of classes"

    def __init__(self, config: AdaMatchConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.labelled_groups = ("weak", "strong") if config.labelled_strong else ("weak",)
        unlabelled = (Views("weak", count=1, evaluated=True), Views("strong", count=1))
        self.needs = (*unlabelled, *(Views(name, count=1, labelled=True) for name in self.labelled_groups))

    def prepare(self, facts: RunFacts) -> None:
        config = self.config
        self.weighting = RelativeThreshold(
            self.learn_classes(facts),
            share=config.threshold,
            momentum=config.distribution_momentum,
            window=config.distribution_window,
        )

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        assert batch.labelled is not None
        labels = batch.labelled.labels
        known = [batch.labelled.one(name) for name in self.labelled_groups]
        features, (*labelled, weak, strong) = self.pair(*known, batch.one("weak"), batch.one("strong"))
        if self.config.interpolate:
            with kept_statistics(self.pair.student):
                _, alone = self.pair(*known)
            labelled = [
                interpolate_logits(joint, own, draw_global(joint.shape, joint.device))
                for joint, own in zip(labelled, alone, strict=True)
            ]
        guessed = self.weighting(weak, labelled[0], batch.sample_ids)
        unlabelled_loss = weighted_cross_entropy(strong, guessed.targets, guessed.weights)
        labelled_loss = torch.stack([weighted_cross_entropy(logits, labels) for logits in labelled]).mean()
        metrics = {
            **guessed.metrics,
            "kept_right": (guessed.weights * are_right(guessed.targets, batch.labels)).float().mean(),
            "labelled_accuracy": accuracy(labelled[0], labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        loss = labelled_loss + self.config.unlabelled_weight(progress) * unlabelled_loss
        return StepOutput(loss, metrics, guessed.carry)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.weighting.after_step(carries)
        super().after_step(carries, progress)
