"""UDA (Xie et al., 2019, https://arxiv.org/abs/1904.12848)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.losses import annealed_cross_entropy, uda_loss, weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import WEAK_AND_STRONG, FewLabels, FewLabelsConfig
from ssl_pipeline.modules.classifier import accuracy, are_right
from ssl_pipeline.schedule import Momentum, Progress, Schedule


class UDAConfig(FewLabelsConfig):
    """UDA: the target of an image's strong view is the sharpened prediction for a weak one."""

    name: Literal["uda"]
    threshold: float = Field(0.8, ge=0, le=1)
    """What the largest unsharpened probability of a weak view must be above."""
    temperature: float = Field(0.4, gt=0, le=1)
    """Temperature that the weak views' predictions are sharpened with."""
    annealing: Literal["none", "linear", "log", "exp"] = "none"
    """How the limit rises above which a labelled image's right probability takes it out of the loss.
    With any but `none` soft labels are learnt as their likeliest class."""
    unlabelled_weight: float = Field(1.0, ge=0)
    """Weight of the loss on unlabelled images relative to the loss on labels."""
    teacher_momentum: Momentum = Schedule(value=0.9999)
    """Share of the evaluated moving average that an update keeps."""


class UDA(FewLabels):
    """Its targets are whole distributions, of confident weak views; the moving average takes no part in training."""

    config_class = UDAConfig
    config: UDAConfig
    needs = WEAK_AND_STRONG
    coupled_by = "the mean over the labels that count"

    def __init__(self, config: UDAConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.hardens_labels = config.annealing != "none"

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        assert batch.labelled is not None
        config, labels = self.config, batch.labelled.labels
        parts = (batch.labelled.one("weak"), batch.one("weak"), batch.one("strong"))
        features, (labelled, weak, strong) = self.pair(*parts)
        if config.annealing == "none":
            labelled_loss = weighted_cross_entropy(labelled, labels)
        else:
            limit = annealing_limit(config.annealing, progress, num_classes=labelled.shape[1])
            classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
            labelled_loss = annealed_cross_entropy(labelled, classes, limit=limit)
        unlabelled_loss, kept = uda_loss(weak, strong, threshold=config.threshold, temperature=config.temperature)
        metrics = {
            "kept": kept.float().mean(),
            "kept_right": (kept * are_right(weak.argmax(dim=1), batch.labels)).float().mean(),
            "labelled_accuracy": accuracy(labelled, labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        return StepOutput(labelled_loss + config.unlabelled_weight * unlabelled_loss, metrics)


def annealing_limit(kind: Literal["linear", "log", "exp"], progress: Progress, *, num_classes: int) -> float:
    """c * (1 - 1 / C) + 1 / C with t the share of the run that is done and c = t, 1 - exp(-5 t) or exp(5 (t - 1))."""
    t = progress.step / progress.total_steps
    risen = {"linear": t, "log": 1 - math.exp(-5 * t), "exp": math.exp(5 * (t - 1))}[kind]
    return risen * (1 - 1 / num_classes) + 1 / num_classes
