"""Barlow Twins (Zbontar et al., 2021, https://arxiv.org/abs/2103.03230)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.config import Config, Depth, Width
from ssl_pipeline.losses import barlow_twins_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import MLPHead, projector_dims
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Progress


class BarlowTwinsConfig(Config):
    """Barlow Twins: a dimension agrees between two views and is uncorrelated with all other dimensions."""

    name: Literal["barlow_twins"]
    off_diagonal_weight: float = Field(0.0051, gt=0)
    """Weight of the correlations between dimensions (lambda)."""
    projector_hidden_dim: Width = 8192
    """Width of the projector's hidden layers."""
    projector_dim: Width = 8192
    """Width of the embedding that is decorrelated."""
    projector_layers: Depth = 3
    """Linear layers of the projector."""
    bias_lr_scale: float = Field(0.024, gt=0)
    """Factor on the learning rate of biases and norms (official code: 0.0048 for them, 0.2 for weights)."""


class BarlowTwins(Method):
    """A backbone and a projector whose dimensions are decorrelated over the global batch.

    With accumulation correlations are those of a micro-batch: k micro-batches are not one big batch here.
    """

    config_class = BarlowTwinsConfig
    coupled_by = "the correlations"
    needs = (Views("view", count=2),)

    def __init__(self, config: BarlowTwinsConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        dims = projector_dims(
            backbone.embed_dim, config.projector_hidden_dim, config.projector_dim, num_layers=config.projector_layers
        )
        self.encoder = Encoder(backbone, MLPHead(dims))

    def backbones(self) -> dict[str, Backbone]:
        return {"encoder": self.encoder.backbone}

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        # each view in a pass of its own, as the official code: batch norm sees one view at a time
        features = [self.encoder.backbone(view) for view in batch.two("view")]
        z1, z2 = [self.encoder.head(features_of_view) for features_of_view in features]
        loss = barlow_twins_loss(z1, z2, off_diagonal_weight=self.config.off_diagonal_weight)
        return StepOutput(loss, {"feature_std": feature_std(features[0], progress)})

    def param_rules(self) -> tuple[ParamRule, ...]:
        if self.config.bias_lr_scale == 1:
            return ()
        vectors = [name for name, p in self.named_parameters() if p.requires_grad and p.ndim <= 1]
        return tuple(ParamRule(name, lr_scale=self.config.bias_lr_scale) for name in vectors)
