"""Networks, batches and optimizers of the measured steps, per size of machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.settings import Size
from ssl_pipeline.backbones import BackboneConfig
from ssl_pipeline.config import Config
from ssl_pipeline.methods.dino import DINOConfig
from ssl_pipeline.methods.mae import MAEConfig
from ssl_pipeline.methods.moco import MoCoConfig
from ssl_pipeline.methods.simclr import SimCLRConfig
from ssl_pipeline.optim.optimizer import OptimConfig
from ssl_pipeline.schedule import Schedule


@dataclass(frozen=True)
class StepSetting:
    """A method with its network, and the batch: views as group -> (count, pixels)."""

    method: Config
    backbone: BackboneConfig
    views: Mapping[str, tuple[int, int]]
    batch_size: int
    optim: OptimConfig

    @property
    def name(self) -> str:
        return str(self.method.name)  # type: ignore[attr-defined]

    def __str__(self) -> str:
        views = " + ".join(f"{count}x{pixels}" for count, pixels in self.views.values())
        return f"{self.backbone.name}, {views}, batch of {self.batch_size}"


NO_ARGUMENTS: Mapping[str, int] = {}


def _vit(name: str, *, mae: bool = False, arguments: Mapping[str, int] = NO_ARGUMENTS) -> BackboneConfig:
    weights: Literal["mae"] | None = "mae" if mae else None
    return BackboneConfig(name=name, arguments=dict(arguments), fixed_positions=mae, initial_weights=weights)


TOY = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
RESNET = BackboneConfig(name="resnet18", small_images=True, arguments={"zero_init_last": False})
TOY_RESNET = BackboneConfig(name="test_resnet", arguments={"stem_type": ""}, small_images=True)
MULTI_CROP = {"global": (2, 224), "local": (8, 96)}
PAIR = {"view": (2, 32)}


def _simclr(*, hidden_dim: int = 512) -> SimCLRConfig:
    return SimCLRConfig(
        name="simclr",
        temperature=0.5,
        projector_hidden_dim=hidden_dim,
        projector_dim=128,
        projector_layers=2,
        projector_last_batch_norm="affine",
    )


def _moco(*, queue_size: int) -> MoCoConfig:
    return MoCoConfig(
        name="moco", queue_size=queue_size, projector_hidden_dim=512, projector_dim=128, projector_layers=2
    )


def _mae(dim: int, depth: int, heads: int) -> MAEConfig:
    return MAEConfig(name="mae", decoder_dim=dim, decoder_depth=depth, decoder_heads=heads)


ADAMW = OptimConfig(
    name="adamw", lr=Schedule(value=5e-4), weight_decay=Schedule(value=0.04), clip_norm=3.0, clip_each=True
)
MAE_ADAMW = OptimConfig(name="adamw", lr=Schedule(value=1.5e-4), weight_decay=Schedule(value=0.05), betas=(0.9, 0.95))
SGD = OptimConfig(name="sgd", lr=Schedule(value=0.03), weight_decay=Schedule(value=5e-4), weight_decay_on="all")
DINO = DINOConfig(name="dino")
TOY_DINO = DINOConfig(name="dino", num_prototypes=64, head_hidden_dim=16, head_bottleneck_dim=8)

SETTINGS: dict[Size, tuple[StepSetting, ...]] = {
    "tiny": (
        StepSetting(
            TOY_DINO, _vit("vit_tiny_patch16_224", arguments=TOY), {"global": (2, 32), "local": (3, 16)}, 2, ADAMW
        ),
        StepSetting(
            _mae(16, 1, 2), _vit("vit_tiny_patch16_224", mae=True, arguments=TOY), {"image": (1, 32)}, 2, MAE_ADAMW
        ),
        StepSetting(_simclr(hidden_dim=16), TOY_RESNET, {"view": (2, 16)}, 4, SGD),
        StepSetting(_moco(queue_size=64), TOY_RESNET, {"view": (2, 16)}, 4, SGD),
    ),
    "small": (
        StepSetting(DINO, _vit("vit_tiny_patch16_224"), MULTI_CROP, 4, ADAMW),
        StepSetting(_mae(256, 4, 8), _vit("vit_small_patch16_224", mae=True), {"image": (1, 224)}, 16, MAE_ADAMW),
        StepSetting(_simclr(), RESNET, PAIR, 32, SGD),
        StepSetting(_moco(queue_size=4096), RESNET, PAIR, 32, SGD),
    ),
    "large": (
        StepSetting(DINO, _vit("vit_small_patch16_224"), MULTI_CROP, 64, ADAMW),
        StepSetting(DINO, _vit("vit_base_patch16_224"), MULTI_CROP, 32, ADAMW),
        StepSetting(_simclr(), _vit("vit_small_patch16_224"), {"view": (2, 224)}, 256, SGD),
        StepSetting(_mae(512, 8, 16), _vit("vit_base_patch16_224", mae=True), {"image": (1, 224)}, 128, MAE_ADAMW),
        StepSetting(_simclr(), RESNET, PAIR, 512, SGD),
        StepSetting(_moco(queue_size=65536), RESNET, PAIR, 512, SGD),
    ),
}
