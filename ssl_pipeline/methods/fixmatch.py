"""FixMatch (Sohn et al., 2020, https://arxiv.org/abs/2001.07685)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, ConfigError
from ssl_pipeline.losses import fixmatch_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.schedule import Progress, Schedule


class FixMatchConfig(Config):
    """FixMatch: what a classifier says with confidence of a weakly augmented image is the label of a strong view."""

    name: Literal["fixmatch"]
    num_classes: int | None = Field(None, gt=1)
    """Classes of the labelled images; null takes as many as their shards have."""
    threshold: float = Field(0.95, ge=0, le=1)
    """Smallest probability of a class that makes it a pseudo-label."""
    unlabelled_weight: float = Field(1.0, ge=0)
    """Weight of the loss on pseudo-labels beside the loss on labels."""
    teacher_momentum: Schedule = Schedule(value=0.999)
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
        self._backbone = (backbone,)  # not a part of this module until its classifier is made
        if config.num_classes is not None:
            self._build(config.num_classes)

    def prepare(self, facts: RunFacts) -> None:
        num_classes = facts.classes(self.config.num_classes)
        if self.config.num_classes is None:
            self._build(num_classes)
        if facts.view_sizes["weak"] != facts.view_sizes["strong"]:
            weak, strong = (" or ".join(map(str, facts.view_sizes[name])) for name in ("weak", "strong"))
            raise ConfigError(f"augment.weak.size and augment.strong.size must be the same. Got {weak} and {strong}.")

    def _build(self, num_classes: int) -> None:
        (backbone,) = self._backbone
        classifier = nn.Linear(backbone.embed_dim, num_classes)
        nn.init.xavier_normal_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        self.student = Encoder(backbone, classifier)
        self.teacher = Teacher(self.student, buffers="copy")

    def backbones(self) -> dict[str, Backbone]:
        return {"teacher": self.teacher.network.backbone, "student": self.student.backbone}

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]
        """The moving average's."""
        return self.teacher.network.head

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        assert batch.labelled is not None
        images = [batch.labelled.one("weak"), batch.one("weak"), batch.one("strong")]
        # one pass, so batch norm sees one distribution
        features = self.student.backbone(torch.cat(images))
        labelled, weak, strong = self.student.head(features).split([len(views) for views in images])
        loss, kept = fixmatch_loss(
            labelled,
            batch.labelled.labels,
            weak,
            strong,
            threshold=self.config.threshold,
            unlabelled_weight=self.config.unlabelled_weight,
        )
        right = weak.detach().argmax(dim=1) == batch.labels
        metrics = {
            "kept": kept.float().mean(),
            "kept_right": (kept & right).float().mean(),
            "labelled_accuracy": (labelled.detach().argmax(dim=1) == batch.labelled.labels).float().mean(),
            "feature_std": feature_std(features.detach()),
        }
        return StepOutput(loss, metrics)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.teacher.update(self.student, self.config.teacher_momentum(progress))
