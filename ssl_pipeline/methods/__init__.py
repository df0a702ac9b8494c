"""The methods: the one place that lists them. A new method is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.config import Config
from ssl_pipeline.methods.base import Method
from ssl_pipeline.methods.byol import Byol, ByolConfig
from ssl_pipeline.methods.dino import Dino, DinoConfig
from ssl_pipeline.methods.fixmatch import FixMatch, FixMatchConfig
from ssl_pipeline.methods.mae import Mae, MaeConfig
from ssl_pipeline.methods.moco import Moco, MocoConfig
from ssl_pipeline.methods.moco_v3 import MocoV3, MocoV3Config
from ssl_pipeline.methods.simclr import Simclr, SimclrConfig
from ssl_pipeline.methods.simsiam import Simsiam, SimsiamConfig

METHODS: dict[type[Config], type[Method]] = {
    ByolConfig: Byol,
    DinoConfig: Dino,
    FixMatchConfig: FixMatch,
    MaeConfig: Mae,
    MocoConfig: Moco,
    MocoV3Config: MocoV3,
    SimclrConfig: Simclr,
    SimsiamConfig: Simsiam,
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
