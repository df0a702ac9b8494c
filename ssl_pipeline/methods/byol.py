"""BYOL (Grill et al., 2020, https://arxiv.org/abs/2006.07733)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.config import Config, Width
from ssl_pipeline.losses import byol_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import MLPHead
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.schedule import Momentum, Progress, Schedule


class BYOLConfig(Config):
    """BYOL: each view predicts what the teacher makes of the other view; there are no negatives."""

    name: Literal["byol"]
    teacher_momentum: Momentum = Schedule(value=0.996, final=1.0)
    """Share of the teacher that an update keeps."""
    projector_hidden_dim: Width = 4096
    """Width of the projector's hidden layer."""
    projector_dim: Width = 256
    """Width of projections and predictions."""
    predictor_hidden_dim: Width = 4096
    """Width of the predictor's hidden layer."""


class BYOL(Method):
    """A backbone, a projector and a predictor, and a teacher of the first two with batch statistics of its own."""

    config_class = BYOLConfig
    needs = (Views("view", count=2),)

    def __init__(self, config: BYOLConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        projector = MLPHead((backbone.embed_dim, config.projector_hidden_dim, config.projector_dim), bias=True)
        self.student = Encoder(backbone, projector)
        self.predictor = MLPHead((config.projector_dim, config.predictor_hidden_dim, config.projector_dim), bias=True)
        self.teacher = Teacher(self.student)

    def backbones(self) -> dict[str, Backbone]:
        return {"student": self.student.backbone, "teacher": self.teacher.network.backbone}

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        views = batch.two("view")
        # each view in a pass of its own, as the official code: batch norm sees one view at a time
        features = [self.student.backbone(view) for view in views]
        p1, p2 = [self.predictor(self.student.head(features_of_view)) for features_of_view in features]
        z1, z2 = [self.teacher(view) for view in views]
        return StepOutput(byol_loss(p1, p2, z1, z2), {"feature_std": feature_std(features[0], progress)})

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.teacher.update(self.student, self.config.teacher_momentum(progress))
