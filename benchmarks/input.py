"""Encoded images -> a batch of views, on one core: what a data worker does, and what is left for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from benchmarks.images import Images, load_images, total_views, views_of, write_shards
from benchmarks.peer_views import KorniaViews, lightly_views
from benchmarks.peers import missing
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig
from benchmarks.torchvision_views import (
    AllViews,
    collate,
    official_views,
    open_pillow,
    v2_pillow_views,
    v2_tensor_views,
)
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.batches import make_batch
from ssl_pipeline.data.decode import decode_image
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream

# Views by the recipe that has them; the last works on 32-pixel images.
RECIPES = {
    "dino": "dino_vits16",
    "simclr": "simclr_resnet50",
    "mae": "mae_vitb16",
    "cifar10": "cifar10_simclr_resnet18",
}
PHOTOGRAPH, SMALL = (500, 375), (32, 32)
PLACES: tuple[Literal["worker", "device"], ...] = ("worker", "device")
SMALL_IMAGES = 16  # times as many of them in a unit

RANDOM = "draws of its own, so only shapes are compared"


def compare_input(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second on one core for the views of DINO, SimCLR, MAE, and SimCLR at 32 pixels."""
    for name, recipe in RECIPES.items():
        small = name == "cifar10"
        source = load_images(config.cifar10 if small else config.imagenet, pixels=SMALL if small else PHOTOGRAPH)
        images = source.spread_out(config.images * (SMALL_IMAGES if small else 1))
        groups = views_of(recipe)
        with TemporaryDirectory() as folder:
            left_out = missing("lightly", "kornia")
            contestants = _contestants(images, groups, Path(folder), left_out)
            yield Comparison(
                f"input {name}",
                "images",
                contestants,
                references=("official",),
                left_out=left_out,
                threads=1,
                setting=f"{total_views(groups)} on one core; {images.source}",
            )


def _contestants(
    images: Images, groups: Mapping[str, ViewGroup], folder: Path, left_out: dict[str, str]
) -> list[Contestant]:
    shards = write_shards(images, folder / "shards")
    sizes = [(group.size, group.size) for group in groups.values() for _ in range(group.count)]

    def peer(name: str, batch_of: Callable[[Sequence[bytes]], list[Tensor]], note: str = "") -> Contestant:
        def unit(number: int) -> int:
            views = batch_of(images.files)
            assert [tuple(view.shape[-2:]) for view in views] == sizes, name
            return len(images.files)

        return Contestant(name, unit, note="; ".join(filter(None, (note, RANDOM))))

    contestants = [
        peer("official", _one_by_one(official_views(groups)), "torchvision v1 on Pillow images"),
        peer("torchvision v2, Pillow", _one_by_one(v2_pillow_views(groups))),
        peer("torchvision v2, tensors", _one_by_one(v2_tensor_views(groups))),
    ]
    if "lightly" not in left_out:
        contestants.append(peer("lightly", _one_by_one(lightly_views(groups))))
    if "kornia" not in left_out:
        contestants.append(peer("kornia", KorniaViews(groups), "no antialiasing"))
    ours = our_contestants(shards, groups, len(images.files), cached=sizes[0] == SMALL)
    return [*contestants, *ours, decode_and_drop(images)]


def our_contestants(shards: Path, groups: Mapping[str, ViewGroup], count: int, *, cached: bool) -> list[Contestant]:
    """What our worker does: crops for the device to colour, crops with their colours, and decoding alone."""

    def contestant(name: str, settings: DataConfig, note: str, *, finish: bool = False) -> Contestant:
        stream = open_stream(open_shards(shards), groups, settings, seed=0, position=0, rank=0, world_size=1)

        def unit(number: int) -> int:
            batch = next(stream)
            if finish:
                make_batch(batch, groups, mean=settings.mean, std=settings.std)
            return count

        return Contestant(name, unit, note=note)

    worker, device = (DataConfig(shards=str(shards), batch_size=count, workers=0, crop_on=place) for place in PLACES)
    contestants = [
        contestant("ours, all on the CPU", worker, "8-bit crops, then colours", finish=True),
        contestant("ours, crops", worker, "8-bit crops; colours are left to the device"),
        contestant("ours, decode only", device, "crops and colours are left to the device"),
    ]
    if cached:
        kept = DataConfig(shards=str(shards), batch_size=count, workers=0, cache=True)
        note = "data.cache: decoded at the start; crops and colours of a batch, on the CPU"
        contestants.insert(0, contestant("ours, cached", kept, note, finish=True))
    return contestants


def decode_and_drop(images: Images) -> Contestant:
    """The ceiling of any pipeline that decodes as we do."""

    def unit(number: int) -> int:
        for content in images.files:
            decode_image(content)
        return len(images.files)

    return Contestant("decode and drop", unit, note="our decoder, nothing else: the ceiling")


def _one_by_one(views: AllViews | Callable) -> Callable[[Sequence[bytes]], list[Tensor]]:
    def batch_of(files: Sequence[bytes]) -> list[Tensor]:
        with torch.no_grad():
            return collate([views(open_pillow(content)) for content in files])

    return batch_of
