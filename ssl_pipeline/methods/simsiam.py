"""SimSiam (Chen & He, 2020, https://arxiv.org/abs/2011.10566)."""

from __future__ import annotations

from typing import Literal

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.config import Config, Depth, Width
from ssl_pipeline.losses import simsiam_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import LastBatchNorm, MLPHead, projector_dims
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Progress


class SimSiamConfig(Config):
    """SimSiam: each view predicts the projection of the other view; no negatives and no teacher."""

    name: Literal["simsiam"]
    projector_hidden_dim: Width = 2048
    """Width of the projector's hidden layers (official code: that of the backbone's features)."""
    projector_dim: Width = 2048
    """Width of projections and predictions."""
    projector_layers: Depth = 3
    """Linear layers of the projector."""
    projector_last_batch_norm: LastBatchNorm = "no_affine"
    """Batch norm after the projector's last layer."""
    predictor_hidden_dim: Width = 512
    """Width of the predictor's hidden layer."""
    constant_predictor_lr: bool = True
    """Whether the predictor's learning rate stays at its base value."""


class SimSiam(Method):
    """A backbone, a projector and a predictor; no gradient flows through the projections that are predicted."""

    config_class = SimSiamConfig
    needs = (Views("view", count=2),)

    def __init__(self, config: SimSiamConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        dims = projector_dims(
            backbone.embed_dim, config.projector_hidden_dim, config.projector_dim, num_layers=config.projector_layers
        )
        self.encoder = Encoder(backbone, MLPHead(dims, last_batch_norm=config.projector_last_batch_norm))
        self.predictor = MLPHead(
            (config.projector_dim, config.predictor_hidden_dim, config.projector_dim), last_bias=True
        )

    def backbones(self) -> dict[str, Backbone]:
        return {"encoder": self.encoder.backbone}

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        # each view in a pass of its own, as the official code: batch norm sees one view at a time
        features = [self.encoder.backbone(view) for view in batch.two("view")]
        z1, z2 = [self.encoder.head(features_of_view) for features_of_view in features]
        loss = simsiam_loss(self.predictor(z1), self.predictor(z2), z1, z2)
        return StepOutput(loss, {"feature_std": feature_std(features[0], progress)})

    def param_rules(self) -> tuple[ParamRule, ...]:
        return (ParamRule("predictor.", constant_lr=True),) if self.config.constant_predictor_lr else ()
