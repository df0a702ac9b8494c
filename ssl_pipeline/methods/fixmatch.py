"""FixMatch (Sohn et al., 2020, https://arxiv.org/abs/2001.07685)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.methods.weak_to_strong import WeakToStrong, WeakToStrongConfig
from ssl_pipeline.modules.pseudo_labels import FixedThreshold


class FixMatchConfig(WeakToStrongConfig):
    """FixMatch: what a classifier says with confidence of a weakly augmented image is the label of a strong view."""

    name: Literal["fixmatch"]
    threshold: float = Field(0.95, ge=0, le=1)
    """Smallest probability of a class that makes it a pseudo-label."""


class FixMatch(WeakToStrong):
    """A guess counts if it is confident; its weight is 1."""

    config_class = FixMatchConfig

    def __init__(self, config: FixMatchConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.weighting = FixedThreshold(threshold=config.threshold)
