"""SimCLR (Chen et al., 2020, https://arxiv.org/abs/2002.05709)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.config import Config, Depth, Width
from ssl_pipeline.losses import nt_xent
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import LastBatchNorm, MLPHead, projector_dims
from ssl_pipeline.schedule import Progress


class SimCLRConfig(Config):
    """SimCLR: two views of an image find each other among all images of the global batch."""

    name: Literal["simclr"]
    temperature: float = Field(0.1, gt=0)
    """Temperature of NT-Xent (paper: 0.1 for ImageNet, 0.5 for CIFAR-10)."""
    projector_hidden_dim: Width = 2048
    """Width of the projector's hidden layers."""
    projector_dim: Width = 128
    """Width of the embedding that the loss compares."""
    projector_layers: Depth = 3
    """Linear layers of the projector (official code: 3, paper: 2)."""
    projector_last_batch_norm: LastBatchNorm = "no_shift"
    """Batch norm after the last layer (official code: scaled, not shifted)."""
    loss_scale: float = Field(1.0, gt=0)
    """Factor of the loss. The official code adds up the means over the two views: 2."""
    separate_passes: bool = False
    """Whether each view passes through the network separately, so that batch norm sees one view at a time (lightly)."""


class SimCLR(Method):
    """A backbone and a projector under NT-Xent; the negatives are the other images of the global batch.

    With accumulation the negatives are those of the micro-batch: k micro-batches are not one big batch here.
    """

    config_class = SimCLRConfig
    coupled_by = "the negatives"
    needs = (Views("view", count=2),)

    def __init__(self, config: SimCLRConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        dims = projector_dims(
            backbone.embed_dim, config.projector_hidden_dim, config.projector_dim, num_layers=config.projector_layers
        )
        self.encoder = Encoder(backbone, MLPHead(dims, last_batch_norm=config.projector_last_batch_norm))

    def backbones(self) -> dict[str, Backbone]:
        return {"encoder": self.encoder.backbone}

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        views = batch.views["view"]
        # one pass over both views, so batch norm sees one distribution
        passes = views.unbind() if self.config.separate_passes else (views.flatten(0, 1),)
        parts = [self.encoder.backbone(images) for images in passes]
        features = torch.cat(parts)
        z1, z2 = torch.cat([self.encoder.head(part) for part in parts]).unflatten(0, views.shape[:2])
        loss = self.config.loss_scale * nt_xent(z1, z2, temperature=self.config.temperature)
        return StepOutput(loss, {"feature_std": feature_std(features, progress)})
