"""One training step of a recipe on this device, measured: seconds, memory, operations. Prints a JSON object.

python -m benchmarks.gpu_check.step_report RECIPE compile=BOOL sharded=BOOL precision=bf16|no [batch=64] [tiny]
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.gpu_check.settings import StepFigures
from benchmarks.rounds import count_flops
from benchmarks.settings import BenchmarkConfig, settings_of
from benchmarks.step import SETTINGS, Steps, StepSetting, make_batch
from benchmarks.training_steps import our_step
from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.backbones.attention import choose_attention
from ssl_pipeline.config import RECIPES, read_recipe, validate
from ssl_pipeline.methods import build_method
from ssl_pipeline.optim.optimizer import OptimConfig
from ssl_pipeline.training.sharding import Sharding

WARM_UP, MEASURED = 3, 10
TINY = {"dino_vits16": "dino", "dinov2_vits14": "dinov2", "dinov2_vitl16_short": "dinov2"}


def setting_of(recipe: str, *, batch: int | None, tiny: bool) -> tuple[StepSetting, OptimConfig]:
    """The network, views and batch of a recipe, and its optimizer; or the tiny one of its method."""
    if tiny:
        steps = validate(Steps, read_recipe(str(SETTINGS), RECIPES))
        name = TINY[recipe]
        return next(one for one in steps.sizes["tiny"] if one.method.name == name), steps.optim[name]
    whole = settings_of(recipe)
    setting = StepSetting(
        method=whole.method,
        backbone=whole.backbone,
        views={name: (group.count, group.sizes[0]) for name, group in whole.augment.items()},
        batch_size=batch or whole.data.batch_size,
    )
    return setting, whole.optim


def measure(
    recipe: str,
    *,
    compiled: bool = False,
    sharded: bool = False,
    precision: str = "bf16",
    batch: int | None = None,
    tiny: bool = False,
) -> StepFigures:
    """Seconds of a step (median), images per second, peak memory, the loss before and after all steps, and the share of
    the device's peak where that is known. sharded: as train.parallel=fsdp does it, in a group of this process alone."""
    config = BenchmarkConfig(precision="bf16" if precision == "bf16" else "no")
    device = config.torch_device()
    setting, optim = setting_of(recipe, batch=batch, tiny=tiny)
    torch.manual_seed(0)
    method = build_method(setting.method, create_backbone(setting.backbone)).to(device)
    with config.autocast():
        choose_attention(method.modules(), torch.empty(1, device=device))
    images = make_batch(setting, method.needs, device)
    step = our_step(method, optim)
    loss = step.first_loss(images)
    flops = count_flops(lambda: step(images, config.autocast()))
    if sharded:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore()
        )
        shared = Sharding(method).share_out(
            step.optimizer, optim, device=device, precision=config.precision, compiled=compiled
        )
        step = our_step(method, optim, shared)
    elif compiled:
        for part in method.parts_to_compile():
            part.compile(dynamic=False)
    torch.manual_seed(1)  # what a step draws is the same, however it is made
    began = time.perf_counter()
    for _ in range(WARM_UP):
        step(images, config.autocast())
    _wait(device)
    first = time.perf_counter() - began
    taken = []
    for _ in range(MEASURED):
        began = time.perf_counter()
        step(images, config.autocast())
        _wait(device)
        taken.append(time.perf_counter() - began)
    seconds, peak, last_loss = median(taken), config.peak_flops(), step.first_loss(images)
    if sharded:
        dist.destroy_process_group()
    return StepFigures(
        recipe=recipe,
        batch=setting.batch_size,
        precision=config.dtype(),
        compiled=compiled,
        sharded=sharded,
        seconds=seconds,
        images_per_second=setting.batch_size / seconds,
        seconds_of_first_steps=first,
        peak_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        loss=loss,
        last_loss=last_loss,
        gflops_per_image=flops / setting.batch_size / 1e9,
        mfu=None if peak is None else flops / seconds / peak,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    given = dict(argument.partition("=")[::2] for argument in rest)
    figures = measure(
        name,
        compiled=given.get("compile") == "true",
        sharded=given.get("sharded") == "true",
        precision=given.get("precision", "bf16"),
        batch=int(given["batch"]) if "batch" in given else None,
        tiny="tiny" in given,
    )
    print(json.dumps(asdict(figures)))
