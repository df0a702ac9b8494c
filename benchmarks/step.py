"""One training step, forward to moving average: ours eager and compiled, the official repositories', lightly's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from benchmarks import lightly_steps as lightly
from benchmarks import official_steps as official
from benchmarks import official_token_steps as official_tokens
from benchmarks.rounds import Comparison
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.training_steps import TrainingStep, our_step
from ssl_pipeline.augment.masks import draw_counts, draw_masks
from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.backbones.attention import choose_attention
from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.config import RECIPES, BatchSize, Config, InRange, read_recipe, validate
from ssl_pipeline.methods import MethodConfig, build_method
from ssl_pipeline.optim.optimizer import OptimConfig

SETTINGS = Path(__file__).with_name("steps.yaml")
SAME = 1e-4  # largest relative gap between losses that are called the same
SAME_BY = "copies of our weights, one batch, float32"
REFERENCES = ("official", "plain PyTorch", "lightly", "encode all")
RESAMPLED = "timm resamples positions with antialiasing, and the example clips no gradients"
ENCODE_ALL = partial(official.official_mae, encode_all=True)
PASSES = ("passes alone", official_tokens.passes_alone, "forward and backward of the networks, the least of any code")
PEERS: Mapping[str, Sequence[tuple[str, Callable[..., TrainingStep], str]]] = {
    "dino": (("official", official.official_dino, ""), ("lightly", lightly.lightly_dino, RESAMPLED)),
    "mae": (
        ("official", official.official_mae, ""),
        ("encode all", ENCODE_ALL, "mask tokens go through the encoder"),
        ("lightly", lightly.lightly_mae, "other masks, plain pixels as targets, a class token among the masked"),
    ),
    "simclr": (
        ("plain PyTorch", official.plain_simclr, ""),
        ("lightly", lightly.lightly_simclr, "batch norm sees one view at a time"),
    ),
    "moco": (("official", official.official_moco, ""), ("lightly", lightly.lightly_moco, "")),
    "swav": (("official", official_tokens.official_swav, ""),),
    "ibot": (("official", official_tokens.official_ibot, ""), PASSES),
    "dinov2": (("official", official_tokens.official_dinov2, ""), PASSES),
}
"""The other code for a method, which takes copies of its weights, and why its loss differs, if it does."""


class StepSetting(Config):
    """A method with its network, and the batch: views as group -> (count, pixels)."""

    method: MethodConfig
    backbone: BackboneConfig
    views: dict[str, Annotated[tuple[int, int], InRange(ge=1, le=8192)]]
    batch_size: BatchSize

    def __str__(self) -> str:
        views = " + ".join(f"{count}x{pixels}" for count, pixels in self.views.values())
        return f"{self.backbone.name}, {views}, batch of {self.batch_size}"


class Steps(Config):
    """What steps.yaml holds."""

    optim: dict[str, OptimConfig]
    sizes: dict[Size, tuple[StepSetting, ...]]


def compare_steps(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second of one step for each method of steps.yaml, all at one batch, dtype and attention."""
    steps = validate(Steps, read_recipe(str(SETTINGS), RECIPES))
    for setting in steps.sizes[config.chosen_size()]:
        about = f"{setting}, {config.dtype()}"
        comparison = Comparison(f"step {setting.method.name}", "images", about, setting.batch_size, REFERENCES)
        _add_contestants(comparison, config, setting, steps.optim[setting.method.name])
        yield comparison


def _add_contestants(comparison: Comparison, config: BenchmarkConfig, setting: StepSetting, optim: OptimConfig) -> None:
    """On its own, so that nothing of a method is held when the next one is made."""
    device = config.torch_device()
    torch.manual_seed(0)
    method = build_method(setting.method, create_backbone(setting.backbone)).to(device)
    with config.autocast():
        choose_attention(method.modules(), torch.empty(1, device=device))  # for the copies that peers make, as for ours
    batch = make_batch(setting, method.needs, device)
    ours = our_step(deepcopy(method), optim)
    loss = ours.first_loss(batch)
    eager = partial(ours, batch, config.autocast())
    for name, make, difference in PEERS[setting.method.name]:
        if name != "lightly" or comparison.has("lightly"):
            step = make(method)
            note = compare_losses(step.first_loss(batch), loss, difference)
            work = partial(step, batch, config.autocast())
            comparison.add(name, work, note, counted=work)
    comparison.add("ours, eager", eager, f"loss {loss:.6f}", counted=eager)
    for part in method.parts_to_compile():  # as train.compile does
        part.compile(dynamic=False)
    compiled = partial(our_step(method, optim), batch, config.autocast())
    comparison.add_compiled(config.why_not_compiled(), compiled, counted=eager)


def make_batch(setting: StepSetting, needs: tuple[Views, ...], device: torch.device) -> Batch:
    """Noise of the setting's shapes, and masks as the method wants them."""
    num_images, views, masks = setting.batch_size, {}, {}
    for name, (count, pixels) in setting.views.items():
        views[name] = torch.randn(count, num_images, 3, pixels, pixels, device=device)
    for name, rule in ((group.name, group.mask) for group in needs if group.mask is not None):
        count, pixels = setting.views[name]
        states = np.arange(count * num_images, dtype=np.uint64).reshape(count, num_images)
        counts = None
        if rule.stratified:
            counts = draw_counts(rule, pixels, states.size, np.zeros((), np.uint64)).reshape(states.shape)
        masks[name] = torch.from_numpy(draw_masks(rule, pixels, states, counts_VB=counts)).to(device)
    sample_ids = torch.arange(num_images, device=device)
    return Batch(views, torch.full_like(sample_ids, -1), sample_ids, masks)


def compare_losses(theirs: float, ours: float, difference: str) -> str:
    """What is said of a peer's loss on our weights and batch."""
    same = abs(theirs - ours) <= SAME * abs(ours)
    outcome = f"loss {theirs:.6f}, {'the same as ours' if same else f'ours {ours:.6f}'} ({SAME_BY})"
    if not same and not difference:
        raise ValueError(f"{outcome}: the two do not do the same work, so a ratio of their times says nothing")
    return f"{outcome}; {difference}" if difference else outcome
