"""One training step, forward to moving average: ours eager and compiled, the official repositories', lightly's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch

from benchmarks import lightly_steps, official_steps
from benchmarks.peers import missing, why_not_compiled
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig
from benchmarks.step_settings import SETTINGS, StepSetting
from benchmarks.training_steps import OurStep, TrainingStep
from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.backbones.attention import choose_attention
from ssl_pipeline.batch import Batch
from ssl_pipeline.methods import build_method
from ssl_pipeline.methods.base import Method
from ssl_pipeline.methods.dino import DINO
from ssl_pipeline.methods.mae import MAE
from ssl_pipeline.methods.moco import MoCo
from ssl_pipeline.methods.simclr import SimCLR

SAME = 1e-4  # largest relative gap between losses that are called the same
SAME_BY = "copies of our weights, one batch, float32"
DIFFERENCES = {
    ("dino", "lightly"): "timm resamples positions with antialiasing, and the example clips no gradients",
    ("mae", "encode all"): "mask tokens go through the encoder",
    ("mae", "lightly"): "other masks, plain pixels as targets, a class token among the masked",
    ("simclr", "lightly"): "batch norm sees one view at a time",
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
    if isinstance(method, DINO):
        num_crops = sum(count for count, _ in setting.views.values())
        return {
            "official": partial(official_steps.official_dino, method, num_crops=num_crops),
            "lightly": partial(lightly_steps.lightly_dino, method),
        }
    if isinstance(method, MAE):
        return {
            "official": partial(official_steps.official_mae, method),
            "encode all": partial(official_steps.official_mae, method, encode_all=True),
            "lightly": partial(lightly_steps.lightly_mae, method),
        }
    if isinstance(method, SimCLR):
        return {
            "plain PyTorch": partial(official_steps.plain_simclr, method),
            "lightly": partial(lightly_steps.lightly_simclr, method),
        }
    assert isinstance(method, MoCo)
    return {
        "official": partial(official_steps.official_moco, method),
        "lightly": partial(lightly_steps.lightly_moco, method),
    }


def compare_losses(theirs: float, ours: float, difference: str) -> str:
    """What is said of a peer's loss on our weights and batch."""
    same = abs(theirs - ours) <= SAME * abs(ours)
    outcome = f"loss {theirs:.6f}, {'the same as ours' if same else f'ours {ours:.6f}'} ({SAME_BY})"
    if not same and not difference:
        raise ValueError(f"{outcome}: the two do not do the same work, so a ratio of their times says nothing")
    return f"{outcome}; {difference}" if difference else outcome


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
    why_not = why_not_compiled(device) if config.compiles() else "compile=true measures it"
    if why_not:
        left_out["ours, compiled"] = why_not
    else:
        for part in method.parts_to_compile():  # as train.compile does
            part.compile(dynamic=False)
        step = OurStep(method, setting.optim).parts()
        contestants.append(Contestant("ours, compiled", unit_of(step), counted=eager, warm_ups=3))
    return contestants
