"""MoCo v3 (Chen et al., 2021, https://arxiv.org/abs/2104.02057)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.config import Config, Depth, Width
from ssl_pipeline.losses import moco_v3_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import LastBatchNorm, MLPHead, projector_dims
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.schedule import Momentum, Progress, Schedule


class MoCoV3Config(Config):
    """MoCo v3: each view finds the teacher's key of the other view among the keys of the global batch.

    The defaults are those of ViTs; ResNets have temperature 1.0, projector_layers 2 and no last batch norm in the
    predictor.
    """

    name: Literal["moco_v3"]
    temperature: float = Field(0.2, gt=0)
    """Temperature of the contrastive loss, which is multiplied by twice this."""
    teacher_momentum: Momentum = Schedule(value=0.99, final=1.0)
    """Share of the teacher that an update keeps."""
    projector_hidden_dim: Width = 4096
    """Width of the projector's hidden layers."""
    projector_dim: Width = 256
    """Width of queries and keys."""
    projector_layers: Depth = 3
    """Linear layers of the projector."""
    predictor_hidden_dim: Width = 4096
    """Width of the predictor's hidden layer."""
    predictor_last_batch_norm: LastBatchNorm = "no_affine"
    """Batch norm after the predictor's last layer."""


class MoCoV3(Method):
    """A backbone, a projector and a predictor that give queries, and a teacher of the first two that gives keys.

    With accumulation the negatives are those of the micro-batch: k micro-batches are not one big batch here.
    """

    config_class = MoCoV3Config
    coupled_by = "the negatives"
    needs = (Views("view", count=2),)

    def __init__(self, config: MoCoV3Config, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        dims = projector_dims(
            backbone.embed_dim, config.projector_hidden_dim, config.projector_dim, num_layers=config.projector_layers
        )
        projector = MLPHead(dims, last_batch_norm="no_affine")
        self.student = Encoder(backbone, projector)
        self.predictor = MLPHead(
            (config.projector_dim, config.predictor_hidden_dim, config.projector_dim),
            last_batch_norm=config.predictor_last_batch_norm,
        )
        self.teacher = Teacher(self.student)

    def backbones(self) -> dict[str, Backbone]:
        return {"student": self.student.backbone, "teacher": self.teacher.network.backbone}

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        views = batch.two("view")
        # each view in a pass of its own, as the official code: batch norm sees one view at a time
        features = [self.student.backbone(view) for view in views]
        q1, q2 = [self.predictor(self.student.head(features_of_view)) for features_of_view in features]
        k1, k2 = [self.teacher(view) for view in views]
        loss = moco_v3_loss(q1, q2, k1, k2, temperature=self.config.temperature)
        return StepOutput(loss, {"feature_std": feature_std(features[0], progress)})

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        # The official code updates the teacher just before it computes the keys of a step, with that step's momentum.
        # That is this update, made at the end of the step before, so the momentum is that of the step to come (BYOL
        # and DINO update after the optimizer with the momentum of the same step).
        next_step = replace(progress, step=progress.step + 1)
        self.teacher.update(self.student, self.config.teacher_momentum(next_step))
