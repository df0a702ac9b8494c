"""What grows with images and processes, in measured pieces: python -m benchmarks.cost_growth [output=DIR].

Order, index and checkpoint are measured on this machine; weights and collectives are counted: on the meta device, and
by a process group that sends nothing (torch's `fake` backend) but has as many ranks as it is told.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from benchmarks.memory import method_without_values, trained_of
from benchmarks.report import Row, table_of
from benchmarks.settings import BenchmarkConfig, settings_of
from benchmarks.start_up import measure_start_up
from benchmarks.step import StepSetting, make_batch
from benchmarks.training_steps import PROGRESS
from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.config import Config, run_command
from ssl_pipeline.data.order import Order
from ssl_pipeline.data.shards.rows import COLUMNS
from ssl_pipeline.files import sha256_of, write_json, write_tensors
from ssl_pipeline.methods import build_method

IMAGES_PER_SHARD = 1000
MEGABYTES = 256  # of the checkpoint that is written
LARGEST, VIT_G = "dinov2_vitl16_short", "vit_giant_patch14_dinov2"
SIDE, FEW_IMAGES = 64, 4  # of the batch by which collectives are counted; what prototypes need depends on neither
TINY_VIT = {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": SIDE}


class CostGrowthConfig(Config):
    """Measure and count what grows with the number of images and of processes."""

    images: tuple[Annotated[int, Field(ge=1000, le=10**11)], ...] = (10**7, 10**8, 10**9)
    """Sizes of data sets whose order is measured."""
    shards: tuple[Annotated[int, Field(ge=1, le=10**6)], ...] = (10_000, 100_000)
    """Numbers of shards that are opened; made-up ones, which take a name each on the disk."""
    processes: tuple[Annotated[int, Field(ge=1, le=2**20)], ...] = (1, 8, 64, 1024)
    """Numbers of processes for which collectives are counted."""
    recipes: tuple[str, ...] = ("simclr_resnet50", "dino_vits16", "dinov2_vits14", LARGEST)
    """Recipes whose weights and collectives are counted."""
    megabytes: Annotated[int, Field(ge=1, le=10**5)] = MEGABYTES
    """Size of the checkpoint that is written and read."""
    output: Path = Path("runs/cost_growth")
    """Directory for cost_growth.json."""


def measure_order(images: int, *, batch: int = 1024) -> Row:
    """The shuffle of a set: seconds to the first batch's samples, and to one in the middle of an epoch; its memory."""
    counts = np.full(images // IMAGES_PER_SHARD, IMAGES_PER_SHARD, dtype=np.int64)
    began = time.perf_counter()
    order = Order(counts, seed=0)
    order.locate(np.arange(batch))
    first = time.perf_counter() - began
    began = time.perf_counter()
    order.locate(np.arange(images // 2, images // 2 + batch))
    middle = time.perf_counter() - began
    parts = [order.counts, order._first_sample, *order._blocks.values()]
    parts += [array for epoch in order._epochs.values() for array in epoch]
    return {
        "images": images,
        "shards": len(counts),
        "first_batch_s": first,
        "another_block_s": middle,
        "memory_mb": sum(part.nbytes for part in parts) / 1e6,
        "index_on_disk_gb": images * 8 * COLUMNS / 1e9,
    }


def measure_checkpoint(folder: Path, megabytes: int) -> dict[str, float]:
    """Megabytes per second of writing tensors durably, and of reading them with their checksum."""
    path = folder / "tensors.safetensors"
    tensors = {f"part{number}": torch.rand(250_000) for number in range(megabytes)}
    began = time.perf_counter()
    write_tensors(path, tensors)
    sha256_of(path)
    written = time.perf_counter() - began
    began = time.perf_counter()
    sha256_of(path)
    read = time.perf_counter() - began
    return {"write_mb_per_s": megabytes / written, "read_mb_per_s": megabytes / read}


def count_state(recipe: str, *, backbone: str | None = None, mb_per_s: float) -> Row:
    """Bytes of the trained weights, of a checkpoint (all weights and two moments), and seconds to write it.

    sharded_mb: what a process of many receives in a step with train.parallel=fsdp in bf16, but for a few percent of
    padding: the trained weights for the forward and again for the backward pass of each group of views, those of the
    teacher once, and the gradients' sums in float32. (Heads, which are gathered once a step, are counted so too.)
    """
    config = settings_of(recipe)
    if backbone is not None:
        larger = BackboneConfig(name=backbone, arguments=config.backbone.arguments)
        config = config.model_copy(update={"backbone": larger})
    method = method_without_values(config)
    trained = sum(parameter.numel() for parameter in trained_of(method))
    frozen = sum(parameter.numel() for parameter in method.parameters()) - trained
    state = sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values())
    moments = 1 if config.optim.name != "adamw" else 2
    checkpoint = (state + 4 * moments * trained) / 1e9
    return {
        "network": f"{config.method.name}, {config.backbone.name}",
        "trained_m": trained / 1e6,
        "checkpoint_gb": checkpoint,
        "checkpoint_s": 1000 * checkpoint / mb_per_s,
        "gradients_mb": 4 * trained / 1e6,
        "sharded_mb": (2 * (2 * len(config.augment) * trained + frozen) + 4 * trained) / 1e6,
    }


def count_collectives(recipe: str, processes: int) -> Row:
    """Calls and megabytes that a method sends and receives in a step besides the gradients, on one process.

    The backbone is a tiny one: what a method sends depends on its heads and its batch.
    """
    config = settings_of(recipe)
    is_vit = config.backbone.name.startswith("vit")
    tiny = BackboneConfig(name="test_resnet")
    if is_vit:
        tiny = BackboneConfig(name="vit_tiny_patch16_224", arguments={**TINY_VIT})
    views = {name: (group.count, SIDE) for name, group in config.augment.items()}
    batch_size = FEW_IMAGES if is_vit else config.data.batch_size
    setting = StepSetting(method=config.method, backbone=tiny, views=views, batch_size=batch_size)
    with group_of(processes) as sent:
        torch.manual_seed(0)
        method = build_method(config.method, create_backbone(tiny))
        output = method(make_batch(setting, method.needs, torch.device("cpu")), PROGRESS)
        output.loss.backward()
        with torch.no_grad():
            method.after_step([output.carry], PROGRESS)
    return {"recipe": recipe, "processes": processes, "calls": len(sent), "megabytes": sum(sent) / 1e6}


@contextmanager
def group_of(processes: int) -> Iterator[list[int]]:
    """A group of so many processes of which this is the first and the others are not there; the bytes of each call."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sent: list[int] = []

    def reduced(tensor: Tensor, *_: object, **__: object) -> None:
        sent.append(tensor.nbytes)

    def gathered(parts: list[Tensor], tensor: Tensor, *_: object, **__: object) -> None:
        for part in parts:
            part.copy_(tensor)
        sent.append(len(parts) * tensor.nbytes)

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        with patch.object(dist, "all_reduce", reduced), patch.object(dist, "all_gather", gathered):
            yield sent
    finally:
        dist.destroy_process_group()


def main(config: CostGrowthConfig) -> None:
    with TemporaryDirectory() as name:
        checkpoint = measure_checkpoint(Path(name), config.megabytes)
        opened = measure_start_up(Path(name), config.shards, rounds=1)
    count = partial(count_state, mb_per_s=checkpoint["write_mb_per_s"])
    largest = [count(LARGEST, backbone=VIT_G)] if LARGEST in config.recipes else []
    tables: dict[str, list[Row]] = {
        "order": [measure_order(images) for images in config.images],
        "index": opened,
        "checkpoint": [{**checkpoint}],
        "state": [*map(count, config.recipes), *largest],
        "collectives": [count_collectives(recipe, number) for recipe in config.recipes for number in config.processes],
    }
    hardware = BenchmarkConfig().hardware()
    print(f"{hardware['cpu']}, {hardware['cores']} cores")
    for title, rows in tables.items():
        print(f"\n{table_of(title, rows, numbered=True)}")
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config.output / "cost_growth.json", {"hardware": hardware, **tables})
    print(f"\n{config.output / 'cost_growth.json'}")


if __name__ == "__main__":
    sys.exit(run_command(CostGrowthConfig, main, command="python -m benchmarks.cost_growth"))
