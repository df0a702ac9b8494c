"""Encoded images -> a batch of views: on one core, and through worker processes.

`input` is what a data worker does, `photometric` what is left for the device: colours, blur, solarization and
normalisation of DINO's crops. `end_to_end` is images on disk -> batches in the trainer, and how much of its own time
the trainer spends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import webdataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder

from benchmarks.images import Images, decode_and_drop, images_for, total_views, views_of
from benchmarks.rounds import Comparison
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.streams import BATCH_SIZE, NUM_IMAGES, PLACES, OurInput, add_steady
from benchmarks.views import FLOAT, MEAN, STD, TORCHVISION, kornia_colours, kornia_views, lightly_views, one_by_one
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
TO_THE_END = ("dino", "mae")  # recipes of `end_to_end`
SMALL_IMAGES = 16  # times as many of them in a unit
RANDOM = "draws of its own, so only shapes are compared"
COLOURED: dict[Size, int] = {"tiny": 2, "small": 8, "large": 64}  # images of a batch
ON_A_CPU = "on a CPU only the samples that an operation concerns are computed, which compiles badly"
DEVICE_PART = {"worker": "copy and colours", "device": "copy, crops and colours"}
NOTES = {"official": "torchvision v1 on Pillow images", "kornia": "no antialiasing"}


def compare_input(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second on one core for the views of DINO, SimCLR, MAE, and SimCLR at 32 pixels."""
    for name, recipe in RECIPES.items():
        small, groups = name == "cifar10", views_of(recipe)
        images = images_for(config, config.images * (SMALL_IMAGES if small else 1), small=small)
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

    def add(name: str, batch_of: Callable[[Sequence[bytes]], list[Tensor]]) -> None:
        def work() -> None:
            assert [tuple(view.shape[-2:]) for view in batch_of(images.files)] == sizes, name

        comparison.add(name, work, f"{NOTES[name]}; {RANDOM}" if name in NOTES else RANDOM)

    for name, peer in TORCHVISION.items():
        add(name, partial(one_by_one, peer.views(groups)))
    if comparison.has("lightly"):
        add("lightly", partial(one_by_one, lightly_views(groups)))
    if comparison.has("kornia"):
        add("kornia", kornia_views(groups))


def _add_ours(comparison: Comparison, shards: Path, groups: Mapping[str, ViewGroup], *, cached: bool) -> None:
    """What our worker does: crops with their colours, crops for the device to colour, and decoding alone."""

    def add(name: str, note: str, *, finish: bool, **keys: object) -> None:
        source = OurInput(groups, settings.model_copy(update=keys))
        stream = source.stream()
        comparison.add(name, lambda: source.views(next(stream)) if finish else next(stream), note)

    settings = DataConfig(shards=str(shards), batch_size=comparison.items or 1, workers=0, crop_on="worker")
    if cached:
        note = "data.cache: decoded at the start; crops and colours of a batch, on the CPU"
        add("ours, cached", note, finish=True, crop_on="auto", cache=True)
    add("ours, all on the CPU", "8-bit crops, then colours", finish=True)
    for place, (title, work) in PLACES.items():
        add(f"ours, {title}", work, finish=False, crop_on=place)


def compare_photometric(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second of colouring the 8-bit crops of DINO, all of them on the device."""
    groups, device = views_of("dino_vits16"), config.torch_device()
    num_images = COLOURED[config.chosen_size()]
    setting = f"{total_views(groups)}, batch of {num_images}"
    comparison = Comparison("photometric", "images", setting, num_images, ("torchvision v2",))
    torch.manual_seed(0)
    crops, draws, generator = {}, {}, np.random.default_rng(0)
    for name, group in groups.items():
        shape, size = (group.count, num_images), max(group.sizes)
        crops[name] = torch.randint(256, (*shape, 3, size, size), dtype=torch.uint8, device=device)
        uniforms = generator.random((*shape, num_uniforms(group)))
        draws[name] = torch.from_numpy(draw_operations(uniforms, group, size=size)).to(device)

    def by_view(colours_of: Callable[[ViewGroup, int], nn.Module], *, batched: bool) -> Callable[[], None]:
        transforms = {name: [colours_of(group, view) for view in range(group.count)] for name, group in groups.items()}

        @torch.no_grad()
        def work() -> None:
            for name, of_group in crops.items():
                for transform, images in zip(transforms[name], of_group, strict=True):
                    if batched:
                        transform(images.float().div_(255))
                    else:
                        torch.stack([transform(image.float().div_(255)) for image in images])

        return work

    @torch.no_grad()
    def ours(*, compiled: bool) -> None:
        for name, group in groups.items():
            apply_photometric(crops[name], draws[name], group, mean=MEAN, std=STD, compile=compiled)

    comparison.add("torchvision v2", by_view(FLOAT.composed, batched=False), "float, one view of one image at a time")
    if comparison.has("kornia"):
        comparison.add("kornia", by_view(kornia_colours, batched=True), "batched")
    comparison.add("ours", partial(ours, compiled=False), "numbers from the host")
    why_not = ON_A_CPU if device.type == "cpu" else config.why_not_compiled()
    comparison.add_compiled(why_not, partial(ours, compiled=True), "compiled, as in training")
    yield comparison
    # the device part: all that the training process does to a batch from the stream before the network gets it
    images = images_for(config, num_images)
    comparison = Comparison("device part", "images", f"{setting} of {images.source}", num_images)
    with images.in_shards() as shards:
        for place in PLACES:
            settings = DataConfig(shards=str(shards), batch_size=num_images, workers=0, crop_on=place)
            source = OurInput(groups, settings, device)
            batch = next(source.stream()).clone()
            comparison.add(f"crop_on={place}", partial(source.views, batch), DEVICE_PART[place])
        yield comparison


def compare_end_to_end(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second that reach the trainer from `workers` processes, steady state, for DINO and MAE."""
    images = images_for(config, NUM_IMAGES[config.chosen_size()])
    for name in TO_THE_END:
        groups = views_of(RECIPES[name])
        setting = f"{total_views(groups)}, {config.workers} workers; {images.source}"
        references = ("official", "decode and drop")
        comparison = Comparison(f"end to end {name}", "images", setting, references=references, threads=1)
        with TemporaryDirectory() as folder:
            _add_to_the_end(comparison, config, images, groups, Path(folder))
            yield comparison


def _add_to_the_end(
    comparison: Comparison, config: BenchmarkConfig, images: Images, groups: Mapping[str, ViewGroup], folder: Path
) -> None:
    device, size = config.torch_device(), config.chosen_size()
    shards, files = images.write_shards(folder / "shards"), str(images.write_folder(folder / "files"))
    official = TORCHVISION["official"].views(groups)
    add = partial(add_steady, comparison, size, turn=config.workers)
    load: Callable[..., DataLoader] = partial(DataLoader, num_workers=config.workers, pin_memory=device.type == "cuda")

    def endless(dataset: Sized, collate: Callable[[list], object] | None = None) -> Iterator[Sequence]:
        """The same images for all, again and again, however many a contestant gets through."""
        return iter(load(dataset, BATCH_SIZE[size], sampler=cycle(range(len(dataset))), collate_fn=collate))

    def of_webdataset() -> DataLoader:
        """Batches by webdataset's reader, which shuffles within a buffer."""
        names = sorted(map(str, shards.glob("*.tar")))
        pairs = webdataset.WebDataset(names, resampled=True, nodesplitter=None, shardshuffle=False).shuffle(64)
        samples = pairs.decode("pil").to_tuple("jpg", "cls").map_tuple(official, int)
        return load(samples.batched(BATCH_SIZE[size], collation_fn=default_collate, partial=False), batch_size=None)

    def there(batches: Callable[[], Iterable[Sequence]]) -> Iterator[object]:
        """Batches whose views are copied to a GPU, where they are ready for the network."""
        for batch in batches():
            if device.type == "cuda":
                for view in batch[0]:
                    view.to(device, non_blocking=True)
            yield batch

    note = "ImageFolder, Pillow, DataLoader"
    add("official", partial(there, lambda: endless(ImageFolder(files, official))), note)
    add("webdataset", partial(there, of_webdataset), "the same transforms behind webdataset's reader")
    if comparison.has("lightly"):
        add("lightly", partial(there, lambda: endless(ImageFolder(files, lightly_views(groups)))), "ImageFolder")
    for place, (title, work) in PLACES.items():
        settings = DataConfig(shards=str(shards), batch_size=BATCH_SIZE[size], workers=config.workers, crop_on=place)
        add(f"ours, {title}", OurInput(groups, settings, device).as_trained, work)
    note = "our decoder, no pixel leaves the worker: the ceiling"
    add("decode and drop", lambda: endless(images.files, decode_and_drop), note)
