"""One training step, forward to moving average: ours eager and compiled, the official repositories', lightly's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from benchmarks import lightly_steps, official_steps
from benchmarks.peers import missing, why_not_compiled
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.training_steps import OurStep, TrainingStep, compile_backbones
from ssl_pipeline.attention import choose_attention
from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.config import Config
from ssl_pipeline.methods import build_method
from ssl_pipeline.methods.base import Method
from ssl_pipeline.methods.dino import Dino, DinoConfig
from ssl_pipeline.methods.mae import Mae, MaeConfig
from ssl_pipeline.methods.moco import Moco, MocoConfig
from ssl_pipeline.methods.simclr import Simclr, SimclrConfig
from ssl_pipeline.optim import OptimConfig
from ssl_pipeline.schedule import Schedule

SAME = 1e-4  # largest relative gap between losses that are called the same
SAME_BY = "copies of our weights, one batch, float32"
DIFFERENCES = {
    ("dino", "lightly"): "timm resamples positions with antialiasing, and the example clips no gradients",
    ("mae", "encode all"): "mask tokens go through the encoder",
    ("mae", "lightly"): "other masks, plain pixels as targets, a class token among the masked",
    ("simclr", "lightly"): "batch norm sees one view at a time",
}


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


def _simclr(*, hidden_dim: int = 512) -> SimclrConfig:
    return SimclrConfig(
        name="simclr",
        temperature=0.5,
        projector_hidden_dim=hidden_dim,
        projector_dim=128,
        projector_layers=2,
        projector_last_batch_norm="affine",
    )


def _moco(*, queue_size: int) -> MocoConfig:
    return MocoConfig(
        name="moco", queue_size=queue_size, projector_hidden_dim=512, projector_dim=128, projector_layers=2
    )


def _mae(dim: int, depth: int, heads: int) -> MaeConfig:
    return MaeConfig(name="mae", decoder_dim=dim, decoder_depth=depth, decoder_heads=heads)


ADAMW = OptimConfig(
    name="adamw", lr=Schedule(value=5e-4), weight_decay=Schedule(value=0.04), clip_norm=3.0, clip_each=True
)
MAE_ADAMW = OptimConfig(name="adamw", lr=Schedule(value=1.5e-4), weight_decay=Schedule(value=0.05), betas=(0.9, 0.95))
SGD = OptimConfig(name="sgd", lr=Schedule(value=0.03), weight_decay=Schedule(value=5e-4), weight_decay_on="all")
DINO = DinoConfig(name="dino")
TOY_DINO = DinoConfig(name="dino", num_prototypes=64, head_hidden_dim=16, head_bottleneck_dim=8)

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

Peers = dict[str, Callable[[], TrainingStep]]


def compare_steps(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second of one step for DINO, MAE, SimCLR and MoCo, all at one batch, dtype and attention."""
    for setting in SETTINGS[config.chosen_size()]:
        left_out = missing("lightly")
        contestants = _contestants(config, setting, left_out)
        dtype = "bf16 autocast" if config.autocast() else "float32"
        yield Comparison(
            f"step {setting.name}",
            "images",
            contestants,
            references=("official", "plain PyTorch", "lightly", "encode all"),
            left_out=left_out,
            setting=f"{setting}, {dtype}",
        )


def make_batch(setting: StepSetting, device: torch.device) -> Batch:
    """Noise of the setting's shapes."""
    views = {
        group: torch.randn(count, setting.batch_size, 3, pixels, pixels, device=device)
        for group, (count, pixels) in setting.views.items()
    }
    return Batch(
        views, torch.full((setting.batch_size,), -1, device=device), torch.arange(setting.batch_size).to(device)
    )


def peers_of(method: Method, setting: StepSetting) -> Peers:
    """The other code for a method, by name; made when called, with copies of the method's weights."""
    if isinstance(method, Dino):
        num_crops = sum(count for count, _ in setting.views.values())
        return {
            "official": partial(official_steps.official_dino, method, num_crops=num_crops),
            "lightly": partial(lightly_steps.lightly_dino, method),
        }
    if isinstance(method, Mae):
        return {
            "official": partial(official_steps.official_mae, method),
            "encode all": partial(official_steps.official_mae, method, encode_all=True),
            "lightly": partial(lightly_steps.lightly_mae, method),
        }
    if isinstance(method, Simclr):
        return {
            "plain PyTorch": partial(official_steps.plain_simclr, method),
            "lightly": partial(lightly_steps.lightly_simclr, method),
        }
    assert isinstance(method, Moco)
    return {
        "official": partial(official_steps.official_moco, method),
        "lightly": partial(lightly_steps.lightly_moco, method),
    }


def compare_losses(theirs: float, ours: float, difference: str) -> str:
    """What is said of a peer's loss on our weights and batch."""
    same = abs(theirs - ours) <= SAME * abs(ours)
    verdict = f"loss {theirs:.6f}, {'the same as ours' if same else f'ours {ours:.6f}'} ({SAME_BY})"
    if not same and not difference:
        raise ValueError(f"{verdict}: the two do not do the same work, so a ratio of their times says nothing")
    return f"{verdict}; {difference}" if difference else verdict


def _contestants(config: BenchmarkConfig, setting: StepSetting, left_out: dict[str, str]) -> list[Contestant]:
    device = config.torch_device()
    torch.manual_seed(0)
    method = build_method(setting.method, create_backbone(setting.backbone)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.autocast()):
        choose_attention(method.modules(), torch.empty(1, device=device))  # for the copies that peers make, as for ours
    batch = make_batch(setting, device)
    loss = OurStep(deepcopy(method), setting.optim).parts().first_loss(batch)

    def unit_of(step: TrainingStep) -> Callable[[int], int]:
        def unit(number: int) -> int:
            step(batch, autocast=config.autocast())
            return setting.batch_size

        return unit

    contestants = []
    for name, make in peers_of(method, setting).items():
        if name not in left_out:
            step = make()
            note = compare_losses(step.first_loss(batch), loss, DIFFERENCES.get((setting.name, name), ""))
            contestants.append(Contestant(name, unit_of(step), counted=unit_of(step), note=note))
    eager = unit_of(OurStep(deepcopy(method), setting.optim).parts())
    contestants.append(Contestant("ours, eager", eager, counted=eager, note=f"loss {loss:.6f}"))
    why_not = why_not_compiled(device) if config.compile else "compile=false"
    if why_not:
        left_out["ours, compiled"] = why_not
    else:
        compile_backbones(method)
        step = OurStep(method, setting.optim).parts()
        contestants.append(Contestant("ours, compiled", unit_of(step), counted=eager, warm_ups=3))
    return contestants
