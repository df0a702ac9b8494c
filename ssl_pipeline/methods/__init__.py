"""The methods: the one place that lists them. A new method is one file and one word in METHODS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.config import Config
from ssl_pipeline.methods.adamatch import AdaMatch
from ssl_pipeline.methods.barlow_twins import BarlowTwins
from ssl_pipeline.methods.base import Method
from ssl_pipeline.methods.beit import BEiT
from ssl_pipeline.methods.byol import BYOL
from ssl_pipeline.methods.co_training import CoTraining
from ssl_pipeline.methods.dino import DINO
from ssl_pipeline.methods.dinov2 import DINOv2
from ssl_pipeline.methods.dinov3 import DINOv3
from ssl_pipeline.methods.distillation import Distillation
from ssl_pipeline.methods.dvae import DVAE
from ssl_pipeline.methods.fixmatch import FixMatch
from ssl_pipeline.methods.flexmatch import FlexMatch
from ssl_pipeline.methods.freematch import FreeMatch
from ssl_pipeline.methods.ibot import IBOT
from ssl_pipeline.methods.mae import MAE
from ssl_pipeline.methods.mean_teacher import MeanTeacher
from ssl_pipeline.methods.mixmatch import MixMatch
from ssl_pipeline.methods.moco import MoCo
from ssl_pipeline.methods.moco_v3 import MoCoV3
from ssl_pipeline.methods.nnclr import NNCLR
from ssl_pipeline.methods.pi_model import PiModel
from ssl_pipeline.methods.pseudo_label import PseudoLabel
from ssl_pipeline.methods.remixmatch import ReMixMatch
from ssl_pipeline.methods.simclr import SimCLR
from ssl_pipeline.methods.simmim import SimMIM
from ssl_pipeline.methods.simsiam import SimSiam
from ssl_pipeline.methods.softmatch import SoftMatch
from ssl_pipeline.methods.supervised import Supervised
from ssl_pipeline.methods.swav import SwAV
from ssl_pipeline.methods.temporal_ensembling import TemporalEnsembling
from ssl_pipeline.methods.uda import UDA
from ssl_pipeline.methods.vicreg import VICReg

METHODS: tuple[type[Method], ...] = (
    AdaMatch,
    BarlowTwins,
    BEiT,
    BYOL,
    CoTraining,
    DINO,
    DINOv2,
    DINOv3,
    Distillation,
    DVAE,
    FixMatch,
    FlexMatch,
    FreeMatch,
    IBOT,
    MAE,
    MeanTeacher,
    MixMatch,
    MoCo,
    MoCoV3,
    NNCLR,
    PiModel,
    PseudoLabel,
    ReMixMatch,
    SimCLR,
    SimMIM,
    SimSiam,
    SoftMatch,
    Supervised,
    SwAV,
    TemporalEnsembling,
    UDA,
    VICReg,
)

if TYPE_CHECKING:

    class MethodConfig(Config):
        """The settings of one of METHODS."""

        name: str

else:
    MethodConfig = Annotated[Union[tuple(m.config_class for m in METHODS)], Field(discriminator="name")]  # noqa: UP007


def build_method(config: Config, backbone: Backbone) -> Method:
    """The method that `config` belongs to, around `backbone`."""
    (method,) = (method for method in METHODS if method.config_class is type(config))
    return method(config, backbone)
