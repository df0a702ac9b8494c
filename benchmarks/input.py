"""Encoded images -> a batch of views, on one core: what a data worker does, and what is left for the device.

`photometric` is what is left: colours, blur, solarization and normalisation of DINO's crops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import views as peers
from benchmarks.images import Images, decode_and_drop, photographs, small_images, total_views, views_of
from benchmarks.rounds import Comparison
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.streams import PLACES, TITLES, WORK, OurInput
from ssl_pipeline.augment.draw import draw_operations, num_uniforms
from ssl_pipeline.augment.photometric import apply_photometric
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.stream import DataConfig

# Views by the recipe that has them; the last works on 32-pixel images.
RECIPES = {
    "dino": "dino_vits16",
    "simclr": "simclr_resnet50",
    "mae": "mae_vitb16",
    "cifar10": "cifar10_simclr_resnet18",
}
SMALL_IMAGES = 16  # times as many of them in a unit
COLOURED: dict[Size, int] = {"tiny": 2, "small": 8, "large": 64}  # images of a batch
ON_A_CPU = "on a CPU only the samples that an operation concerns are computed, which compiles badly"
DEVICE_PART = {"worker": "copy and colours", "device": "copy, crops and colours"}
RANDOM = "draws of its own, so only shapes are compared"


def compare_input(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second on one core for the views of DINO, SimCLR, MAE, and SimCLR at 32 pixels."""
    for name, recipe in RECIPES.items():
        small, groups = name == "cifar10", views_of(recipe)
        images = small_images(config, config.images * SMALL_IMAGES) if small else photographs(config, config.images)
        setting = f"{total_views(groups)} on one core; {images.source}"
        comparison = Comparison(f"input {name}", "images", setting, len(images.files), ("official",), threads=1)
        _add_peers(comparison, images, groups)
        with images.in_shards() as shards:
            _add_ours(comparison, shards, groups, cached=small)
            note = "our decoder, nothing else: the ceiling"
            comparison.add("decode and drop", partial(decode_and_drop, images.files), note)
            yield comparison


def _add_peers(comparison: Comparison, images: Images, groups: Mapping[str, ViewGroup]) -> None:
    sizes = [(group.size, group.size) for group in groups.values() for _ in range(group.count)]

    def add(name: str, batch_of: Callable[[Sequence[bytes]], list[Tensor]], note: str = "") -> None:
        def work() -> None:
            assert [tuple(view.shape[-2:]) for view in batch_of(images.files)] == sizes, name

        comparison.add(name, work, "; ".join(filter(None, (note, RANDOM))))

    add("official", partial(peers.one_by_one, peers.official_views(groups)), "torchvision v1 on Pillow images")
    add("torchvision v2, Pillow", partial(peers.one_by_one, peers.v2_pillow_views(groups)))
    add("torchvision v2, tensors", partial(peers.one_by_one, peers.v2_tensor_views(groups)))
    if comparison.has("lightly"):
        add("lightly", partial(peers.one_by_one, peers.lightly_views(groups)))
    if comparison.has("kornia"):
        add("kornia", peers.kornia_views(groups), "no antialiasing")


def _add_ours(comparison: Comparison, shards: Path, groups: Mapping[str, ViewGroup], *, cached: bool) -> None:
    """What our worker does: crops with their colours, crops for the device to colour, and decoding alone."""

    def add(name: str, settings: DataConfig, note: str, *, finish: bool) -> None:
        source = OurInput(groups, settings)
        stream = source.stream()
        comparison.add(name, lambda: source.views(next(stream)) if finish else next(stream), note)

    settings = DataConfig(shards=str(shards), batch_size=comparison.items or 1, workers=0, crop_on="worker")
    if cached:
        note = "data.cache: decoded at the start; crops and colours of a batch, on the CPU"
        add("ours, cached", settings.model_copy(update={"crop_on": "auto", "cache": True}), note, finish=True)
    add("ours, all on the CPU", settings, "8-bit crops, then colours", finish=True)
    for place in PLACES:
        add(f"ours, {TITLES[place]}", settings.model_copy(update={"crop_on": place}), WORK[place], finish=False)


def compare_photometric(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second of colouring the 8-bit crops of DINO, all of them on the device."""
    groups, num_images, device = views_of("dino_vits16"), COLOURED[config.chosen_size()], config.torch_device()
    setting = f"{total_views(groups)}, batch of {num_images}"
    comparison = Comparison("photometric", "images", setting, num_images, ("torchvision v2",))
    torch.manual_seed(0)
    crops = {
        name: torch.randint(
            256, (group.count, num_images, 3, *[max(group.sizes)] * 2), dtype=torch.uint8, device=device
        )
        for name, group in groups.items()
    }

    def by_view(colours_of: Callable[[ViewGroup, int], nn.Module], *, batched: bool) -> Callable[[], None]:
        transforms = {name: [colours_of(group, view) for view in range(group.count)] for name, group in groups.items()}

        @torch.no_grad()
        def work() -> None:
            for name, views in crops.items():
                for transform, images in zip(transforms[name], views, strict=True):
                    if batched:
                        transform(images.float().div_(255))
                    else:
                        torch.stack([transform(image.float().div_(255)) for image in images])

        return work

    comparison.add("torchvision v2", by_view(peers.v2_colours, batched=False), "float, one view of one image at a time")
    if comparison.has("kornia"):
        comparison.add("kornia", by_view(peers.kornia_colours, batched=True), "batched")
    comparison.add("ours", _ours(groups, crops), "numbers from the host")
    why_not = ON_A_CPU if device.type == "cpu" else config.why_not_compiled()
    comparison.add_compiled(why_not, _ours(groups, crops, compiled=True), "compiled, as in training")
    yield comparison
    # the device part: all that the training process does to a batch from the stream before the network gets it
    images = photographs(config, num_images)
    comparison = Comparison("device part", "images", f"{setting} of {images.source}", len(images.files))
    with images.in_shards() as shards:
        for place in PLACES:
            settings = DataConfig(shards=str(shards), batch_size=len(images.files), workers=0, crop_on=place)
            source = OurInput(groups, settings, device)
            batch = next(source.stream()).clone()
            comparison.add(f"crop_on={place}", partial(source.views, batch), DEVICE_PART[place])
        yield comparison


def _ours(
    groups: Mapping[str, ViewGroup], crops: Mapping[str, Tensor], *, compiled: bool = False
) -> Callable[[], None]:
    generator = np.random.default_rng(0)
    draws = {}
    for name, group in groups.items():
        uniforms = generator.random((*crops[name].shape[:2], num_uniforms(group)))
        draws[name] = torch.from_numpy(draw_operations(uniforms, group, size=crops[name].shape[-1])).to(
            crops[name].device
        )

    def work() -> None:
        for name, group in groups.items():
            apply_photometric(crops[name], draws[name], group, mean=peers.MEAN, std=peers.STD, compile=compiled)

    return torch.no_grad()(work)
