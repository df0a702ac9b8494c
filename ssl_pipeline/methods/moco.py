"""MoCo v1 (He et al., 2019, https://arxiv.org/abs/1911.05722) and v2 (Chen et al., 2020,
https://arxiv.org/abs/2003.04297)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, Depth, Width
from ssl_pipeline.distributed import gather
from ssl_pipeline.losses import info_nce
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import MLPHead, projector_dims
from ssl_pipeline.modules.memory import FeatureQueue, check_queue_size
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.schedule import Momentum, Progress, Schedule


class MoCoConfig(Config):
    """MoCo: a view finds the teacher's key of the other view among the keys of earlier batches.

    The defaults are v2's; v1 has projector_layers 1 and temperature 0.07.
    """

    name: Literal["moco"]
    queue_size: int = Field(65536, gt=0, le=2**24)
    """Earlier keys that serve as negatives."""
    temperature: float = Field(0.2, gt=0)
    """Temperature of InfoNCE."""
    teacher_momentum: Momentum = Schedule(value=0.999)
    """Share of the teacher that an update keeps."""
    projector_hidden_dim: Width = 2048
    """Width of the projector's hidden layers (official code: that of the backbone's features)."""
    projector_dim: Width = 128
    """Width of queries and keys."""
    projector_layers: Depth = 2
    """Linear layers of the projector."""
    symmetric: bool = False
    """Whether both views are queries; the loss is then the mean of both and the keys of both enter the queue."""


class MoCo(Method):
    """A backbone and a projector that give queries, a teacher of both that gives keys, and a queue of earlier keys.

    Every micro-batch of a step reads the queue as it was before the step, so k micro-batches are one big batch here,
    batch norm aside.
    """

    config_class = MoCoConfig
    needs = (Views("view", count=2),)

    def __init__(self, config: MoCoConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        dims = projector_dims(
            backbone.embed_dim, config.projector_hidden_dim, config.projector_dim, num_layers=config.projector_layers
        )
        self.student = Encoder(backbone, MLPHead(dims, batch_norm=False, bias=True, last_bias=True))
        self.teacher = Teacher(self.student)
        self.queue = FeatureQueue(config.queue_size, config.projector_dim)

    def backbones(self) -> dict[str, Backbone]:
        return {"student": self.student.backbone, "teacher": self.teacher.network.backbone}

    def prepare(self, facts: RunFacts) -> None:
        num_keys = facts.global_batch * (2 if self.config.symmetric else 1)
        brought = f"the {num_keys} keys that a step brings (global batch {facts.global_batch})"
        check_queue_size(self.config.queue_size, num_keys, multiple_of=brought)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        first, second = batch.two("view")
        pairs = [(first, second), (second, first)] if self.config.symmetric else [(first, second)]
        losses, keys = [], []
        for query_view, key_view in pairs:  # each view in a pass of its own, as the official code
            features = self.student.backbone(query_view)
            keys.append(F.normalize(self.teacher(key_view), dim=1))
            loss = info_nce(
                self.student.head(features), keys[-1], self.queue.features, temperature=self.config.temperature
            )
            losses.append(loss)
        metrics = {"feature_std": feature_std(features, progress)}
        return StepOutput(torch.stack(losses).mean(), metrics, {"keys": torch.stack(keys)})

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        # in the order of the global batch: view, then micro-batch, then rank
        keys_BVD = torch.cat([gather(carry["keys"].transpose(0, 1)) for carry in carries])
        self.queue.enqueue(keys_BVD.transpose(0, 1).flatten(0, 1))
        # The official code updates the teacher just before it computes the keys, from weights that the step before has
        # left. Doing so at the end of that step is the same, with the momentum of the step to come; the first update
        # that is left out would have mixed the teacher with the student it is a copy of.
        next_step = replace(progress, step=progress.step + 1)
        self.teacher.update(self.student, self.config.teacher_momentum(next_step))
