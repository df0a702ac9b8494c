"""The part of augmentation that runs on the device: colours, blur, solarization and normalisation of DINO's crops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.images import load_images, total_views, views_of, write_shards
from benchmarks.input import PHOTOGRAPH, PLACES
from benchmarks.peer_views import kornia_colours
from benchmarks.peers import missing, why_not_compiled
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.torchvision_views import MEAN, STD, v2_colours
from ssl_pipeline.augment.draw import draw_operations, num_uniforms
from ssl_pipeline.augment.photometric import apply_photometric
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.batches import make_batch
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream

BATCH_SIZE: dict[Size, int] = {"tiny": 2, "small": 8, "large": 64}


def compare_photometric(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second of colouring the 8-bit crops of DINO, all of them on the device."""
    groups = views_of("dino_vits16")
    num_images, device = BATCH_SIZE[config.chosen_size()], config.torch_device()
    left_out = missing("kornia")
    torch.manual_seed(0)
    crops = {
        name: torch.randint(256, (group.count, num_images, 3, group.size, group.size), dtype=torch.uint8, device=device)
        for name, group in groups.items()
    }

    def contestant(name: str, colour: Callable[[str, Tensor], None], note: str, warm_ups: int = 1) -> Contestant:
        def unit(number: int) -> int:
            with torch.no_grad():
                for group, images in crops.items():
                    colour(group, images)
            return num_images

        return Contestant(name, unit, note=note, warm_ups=warm_ups)

    contestants = [contestant("torchvision v2", _one_by_one(groups), "float, one view of one image at a time")]
    if not left_out:
        contestants.append(contestant("kornia", _batched(groups), "batched"))
    contestants.append(contestant("ours", _ours(groups, num_images, device), "numbers from the host"))
    why_not = why_not_compiled(device) if config.compiles() else "compile=true measures it"
    if device.type == "cpu":
        why_not = "on a CPU only the samples that an operation concerns are computed, which compiles badly"
    if why_not:
        left_out["ours, compiled"] = why_not
    else:
        compiled = _ours(groups, num_images, device, compiled=True)
        contestants.append(contestant("ours, compiled", compiled, "compiled, as in training", warm_ups=3))
    setting = f"{total_views(groups)}, batch of {num_images}"
    yield Comparison("photometric", "images", contestants, ("torchvision v2",), left_out, setting=setting)
    with TemporaryDirectory() as folder:
        images = load_images(config.imagenet, pixels=PHOTOGRAPH).spread_out(num_images)
        shards = write_shards(images, Path(folder) / "shards")
        yield Comparison(
            "device part",
            "images",
            [_device_part(place, shards, groups, num_images, device) for place in PLACES],
            setting=f"{setting} of {images.source}",
        )


def _device_part(
    place: Literal["worker", "device"],
    shards: Path,
    groups: Mapping[str, ViewGroup],
    num_images: int,
    device: torch.device,
) -> Contestant:
    """All that the training process does to a batch from the stream before the network gets it."""
    settings = DataConfig(shards=str(shards), batch_size=num_images, workers=0, crop_on=place)
    stream = open_stream(open_shards(shards), groups, settings, seed=0, position=0, rank=0, world_size=1)
    batch = next(stream).clone()

    def unit(number: int) -> int:
        make_batch(batch.to(device, non_blocking=True), groups, mean=settings.mean, std=settings.std)
        return num_images

    work = {"worker": "copy and colours", "device": "copy, crops and colours"}
    return Contestant(f"crop_on={place}", unit, note=work[place])


def _ours(
    groups: Mapping[str, ViewGroup], num_images: int, device: torch.device, *, compiled: bool = False
) -> Callable[[str, Tensor], None]:
    generator = np.random.default_rng(0)
    draws = {}
    for name, group in groups.items():
        uniforms = generator.random((group.count, num_images, num_uniforms(group)))
        draws[name] = torch.from_numpy(draw_operations(uniforms, group, size=group.size)).to(device)

    def colour(name: str, crops: Tensor) -> None:
        apply_photometric(crops, draws[name], groups[name], mean=MEAN, std=STD, compile=compiled)

    return colour


def _one_by_one(groups: Mapping[str, ViewGroup]) -> Callable[[str, Tensor], None]:
    transforms = {name: [v2_colours(group, view) for view in range(group.count)] for name, group in groups.items()}

    def colour(name: str, crops: Tensor) -> None:
        for transform, images in zip(transforms[name], crops, strict=True):
            torch.stack([transform(image.float().div_(255)) for image in images])

    return colour


def _batched(groups: Mapping[str, ViewGroup]) -> Callable[[str, Tensor], None]:
    transforms = {name: [kornia_colours(group, view) for view in range(group.count)] for name, group in groups.items()}

    def colour(name: str, crops: Tensor) -> None:
        for transform, images in zip(transforms[name], crops, strict=True):
            transform(images.float().div_(255))

    return colour
