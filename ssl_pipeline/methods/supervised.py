"""Learning from labels alone: the baseline of the semi-supervised methods.

Label smoothing (Szegedy et al., 2015, https://arxiv.org/abs/1512.00567), mixup (Zhang et al., 2017,
https://arxiv.org/abs/1710.09412) and CutMix (Yun et al., 2019, https://arxiv.org/abs/1905.04899) on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, InRange
from ssl_pipeline.losses import weighted_cross_entropy
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.batch_mixing import as_targets, cutmix_global_batch, draw_for_all, mixup_global_batch
from ssl_pipeline.modules.classifier import ClassifierPair, accuracy
from ssl_pipeline.schedule import Progress, Schedule


class SupervisedConfig(Config):
    """Supervised learning: cross-entropy on the labelled images; the images of data.shards only count the epochs."""

    name: Literal["supervised"]
    num_classes: int | None = Field(None, gt=1, le=2**20)
    """Classes of the labelled images; null takes as many as their shards have."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a label that is spread over all classes."""
    mixup_alpha: float = Field(0.0, ge=0, le=1000)
    """mixup's Beta(alpha, alpha), a share for each image; 0: no mixup."""
    cutmix_alpha: float = Field(0.0, ge=0, le=1000)
    """CutMix's Beta(alpha, alpha), a box for each batch; 0: none. With both, a batch takes either, evenly often."""
    teacher_momentum: Annotated[Schedule, InRange(ge=0, le=1)] = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps; 0 evaluates the weights themselves."""


class Supervised(Method):
    """A backbone with a linear classifier; its moving average, batch-norm statistics copied, is what is evaluated.

    Images are mixed over the global batch. With accumulation that is the micro-batch of all processes.
    """

    config_class = SupervisedConfig
    coupled_by = "what images are mixed with"
    needs = (Views("weak", count=1, labelled=True, evaluated=True),)

    def __init__(self, config: SupervisedConfig, backbone: Backbone) -> None:
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
        images, targets = self._mixed(batch.labelled.one("weak"), labels)
        features, (logits,) = self.pair(images)
        metrics = {"labelled_accuracy": accuracy(logits, labels), "feature_std": feature_std(features.detach())}
        return StepOutput(weighted_cross_entropy(logits, targets), metrics)

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets (B, classes) of which the loss is taken."""
        config = self.config
        num_classes = self.classifier.out_features
        targets = as_targets(labels, num_classes, smoothing=config.label_smoothing, dtype=images.dtype)
        both = []
        if config.mixup_alpha:
            both.append(mixup_global_batch([images], [targets], alpha=config.mixup_alpha))
        if config.cutmix_alpha:
            both.append(cutmix_global_batch([images], [targets], alpha=config.cutmix_alpha))
        choices = [(mixed, mixed_targets) for (mixed,), (mixed_targets,) in both] or [(images, targets)]
        if len(choices) == 1:
            return choices[0]
        first = draw_for_all(images.device) < 0.5
        (mixup_images, mixup_targets), (cutmix_images, cutmix_targets) = choices
        return torch.where(first, mixup_images, cutmix_images), torch.where(first, mixup_targets, cutmix_targets)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.pair.update(self.config.teacher_momentum(progress))
