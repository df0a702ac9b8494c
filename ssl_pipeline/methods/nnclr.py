"""NNCLR (Dwibedi et al., 2021, https://arxiv.org/abs/2104.14548)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, Depth, Width
from ssl_pipeline.distributed import gather
from ssl_pipeline.losses import nnclr_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import LastBatchNorm, MLPHead, projector_dims
from ssl_pipeline.modules.memory import FeatureQueue, check_queue_size
from ssl_pipeline.schedule import Progress


class NNCLRConfig(Config):
    """NNCLR: a view's nearest neighbour among earlier images finds the other view among those of the batch."""

    name: Literal["nnclr"]
    queue_size: int = Field(98304, gt=0, le=2**24)
    """Earlier projections among which nearest neighbours are searched (the support set)."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the cross-entropy."""
    projector_hidden_dim: Width = 2048
    """Width of the projector's hidden layers."""
    projector_dim: Width = 256
    """Width of projections and predictions."""
    projector_layers: Depth = 3
    """Linear layers of the projector."""
    projector_last_batch_norm: LastBatchNorm = "affine"
    """Batch norm after the projector's last layer."""
    predictor_hidden_dim: Width = 4096
    """Width of the predictor's hidden layer."""


class NNCLR(Method):
    """A backbone, a projector and a predictor, and a queue of the projections of first views.

    The negatives are the predictions of the global batch. With accumulation they are those of the micro-batch:
    k micro-batches are not one big batch here.
    """

    config_class = NNCLRConfig
    coupled_by = "the negatives"
    needs = (Views("view", count=2),)

    def __init__(self, config: NNCLRConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        dims = projector_dims(
            backbone.embed_dim, config.projector_hidden_dim, config.projector_dim, num_layers=config.projector_layers
        )
        self.encoder = Encoder(backbone, MLPHead(dims, last_batch_norm=config.projector_last_batch_norm))
        dims = (config.projector_dim, config.predictor_hidden_dim, config.projector_dim)
        self.predictor = MLPHead(dims, last_bias=True)
        self.queue = FeatureQueue(config.queue_size, config.projector_dim)

    def backbones(self) -> dict[str, Backbone]:
        return {"encoder": self.encoder.backbone}

    def prepare(self, facts: RunFacts) -> None:
        brought = f"the global batch, {facts.global_batch}"
        check_queue_size(self.config.queue_size, facts.global_batch, multiple_of=brought)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        # each view in a pass of its own, as the paper's pseudocode: batch norm sees one view at a time
        features = [self.encoder.backbone(view) for view in batch.two("view")]
        z1, z2 = [self.encoder.head(features_of_view) for features_of_view in features]
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss = nnclr_loss(p1, p2, z1, z2, self.queue.features, temperature=self.config.temperature)
        keys = F.normalize(z1.detach(), dim=1)
        return StepOutput(loss, {"feature_std": feature_std(features[0], progress)}, {"keys": keys})

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        # in the order of the global batch: micro-batch, then rank
        self.queue.enqueue(torch.cat([gather(carry["keys"]) for carry in carries]))
