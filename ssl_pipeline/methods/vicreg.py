"""VICReg (Bardes et al., 2021, https://arxiv.org/abs/2105.04906)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.config import Config, Depth, Width
from ssl_pipeline.losses import vicreg_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import MLPHead, projector_dims
from ssl_pipeline.schedule import Progress


class VICRegConfig(Config):
    """VICReg: two views agree, every dimension varies over the batch, and no two dimensions vary together."""

    name: Literal["vicreg"]
    invariance_weight: float = Field(25.0, ge=0)
    """Weight of the squared distance between the views (lambda)."""
    variance_weight: float = Field(25.0, ge=0)
    """Weight of how far a dimension's standard deviation falls short of 1 (mu)."""
    covariance_weight: float = Field(1.0, ge=0)
    """Weight of the covariances between dimensions (nu)."""
    projector_hidden_dim: Width = 8192
    """Width of the hidden layers of the projector (the expander)."""
    projector_dim: Width = 8192
    """Width of the embedding that the loss is computed on."""
    projector_layers: Depth = 3
    """Linear layers of the projector."""


class VICReg(Method):
    """A backbone and a projector; variances and covariances are those of the global batch.

    With accumulation they are those of a micro-batch: k micro-batches are not one big batch here.
    """

    config_class = VICRegConfig
    coupled_by = "the variances and covariances"
    needs = (Views("view", count=2),)

    def __init__(self, config: VICRegConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        dims = projector_dims(
            backbone.embed_dim, config.projector_hidden_dim, config.projector_dim, num_layers=config.projector_layers
        )
        self.encoder = Encoder(backbone, MLPHead(dims, bias=True))

    def backbones(self) -> dict[str, Backbone]:
        return {"encoder": self.encoder.backbone}

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        # each view in a pass of its own, as the official code: batch norm sees one view at a time
        features = [self.encoder.backbone(view) for view in batch.two("view")]
        z1, z2 = [self.encoder.head(features_of_view) for features_of_view in features]
        loss, terms = vicreg_loss(
            z1,
            z2,
            invariance_weight=self.config.invariance_weight,
            variance_weight=self.config.variance_weight,
            covariance_weight=self.config.covariance_weight,
        )
        return StepOutput(loss, {**terms, "feature_std": feature_std(features[0], progress)})
