"""The methods: the one place that lists them. A new method is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.config import Config
from ssl_pipeline.methods.base import Method
from ssl_pipeline.methods.byol import BYOL, BYOLConfig
from ssl_pipeline.methods.dino import DINO, DINOConfig
from ssl_pipeline.methods.fixmatch import FixMatch, FixMatchConfig
from ssl_pipeline.methods.mae import MAE, MAEConfig
from ssl_pipeline.methods.moco import MoCo, MoCoConfig
from ssl_pipeline.methods.moco_v3 import MoCoV3, MoCoV3Config
from ssl_pipeline.methods.simclr import SimCLR, SimCLRConfig
from ssl_pipeline.methods.simsiam import SimSiam, SimSiamConfig

METHODS: dict[type[Config], type[Method]] = {
    BYOLConfig: BYOL,
    DINOConfig: DINO,
    FixMatchConfig: FixMatch,
    MAEConfig: MAE,
    MoCoConfig: MoCo,
    MoCoV3Config: MoCoV3,
    SimCLRConfig: SimCLR,
    SimSiamConfig: SimSiam,
}

if TYPE_CHECKING:

    class MethodConfig(Config):
        """The settings of one of METHODS."""

        name: str

else:
    MethodConfig = Annotated[Union[tuple(METHODS)], Field(discriminator="name")]  # noqa: UP007


def build_method(config: Config, backbone: Backbone) -> Method:
    """The method that `config` belongs to, around `backbone`."""
    return METHODS[type(config)](config, backbone)
