"""Images on disk -> batches in the trainer, through worker processes; how much of its own time the trainer spends.

`scaling` is the same for our input alone, against the number of worker and of training processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder

from benchmarks.images import Images, decode_and_drop, photographs, total_views, views_of
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig, Size, num_cores
from benchmarks.streams import PLACES, TITLES, UNIT_SECONDS, WORK, OurInput, Steady, batches_of_world
from benchmarks.views import ViewsOf, lightly_views, official_views
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.stream import DataConfig

RECIPES = {"dino": "dino_vits16", "mae": "mae_vitb16"}
BATCH_SIZE: dict[Size, int] = {"tiny": 2, "small": 64, "large": 64}
NUM_IMAGES: dict[Size, int] = {"tiny": 8, "small": 128, "large": 512}

Batches = Callable[[], Iterator[object]]


def compare_end_to_end(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second that reach the trainer from `workers` processes, steady state, for DINO and MAE."""
    images = photographs(config, NUM_IMAGES[config.chosen_size()])
    for name, recipe in RECIPES.items():
        groups = views_of(recipe)
        setting = f"{total_views(groups)}, {config.workers} workers; {images.source}"
        references = ("official", "decode and drop")
        comparison = Comparison(f"end to end {name}", "images", setting, references=references, threads=1)
        with TemporaryDirectory() as folder:
            _add_contestants(comparison, config, images, groups, Path(folder))
            yield comparison


def _add_contestants(
    comparison: Comparison, config: BenchmarkConfig, images: Images, groups: Mapping[str, ViewGroup], folder: Path
) -> None:
    device, batch_size = config.torch_device(), BATCH_SIZE[config.chosen_size()]
    shards, files = images.write_shards(folder / "shards"), str(images.write_folder(folder / "files"))
    add = partial(_add, comparison, config, turn=config.workers)
    load: Callable[..., DataLoader] = partial(DataLoader, num_workers=config.workers, pin_memory=device.type == "cuda")

    def endless(dataset: Sized, collate: Callable[[list], object] | None = None) -> Iterator[object]:
        """The same images for all, again and again, however many a contestant gets through."""
        return iter(load(dataset, batch_size, sampler=cycle(range(len(dataset))), collate_fn=collate))

    def of_folder(views: ViewsOf) -> Iterator[object]:
        return map(partial(_to, device), endless(ImageFolder(files, views)))

    def of_webdataset() -> Iterator[object]:
        dataset = _webdataset(shards, official_views(groups), batch_size)
        return map(partial(_to, device), load(dataset, batch_size=None))

    add("official", lambda: of_folder(official_views(groups)), "ImageFolder, Pillow, DataLoader")
    add("webdataset", of_webdataset, "the same transforms behind webdataset's reader")
    if comparison.has("lightly"):
        add("lightly", lambda: of_folder(lightly_views(groups)), "ImageFolder")
    for place in PLACES:
        settings = DataConfig(shards=str(shards), batch_size=batch_size, workers=config.workers, crop_on=place)
        add(f"ours, {TITLES[place]}", OurInput(groups, settings, device).as_trained, WORK[place])
    note = "our decoder, no pixel leaves the worker: the ceiling"
    add("decode and drop", lambda: endless(images.files, decode_and_drop), note)


def _add(
    comparison: Comparison, config: BenchmarkConfig, name: str, batches: Batches, note: str = "", *, turn: int
) -> None:
    size = config.chosen_size()
    source = Steady(batches, batch_size=BATCH_SIZE[size], turn=turn, seconds=UNIT_SECONDS[size])
    comparison.contestants.append(Contestant(name, source.draw, note, session=source.opened))


def _webdataset(shards: Path, views: ViewsOf, batch_size: int) -> webdataset.WebDataset:
    """Batches by webdataset's reader, which shuffles within a buffer."""
    files = sorted(map(str, shards.glob("*.tar")))
    return (
        webdataset.WebDataset(files, resampled=True, nodesplitter=None, shardshuffle=False)
        .shuffle(64)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(views, int)
        .batched(batch_size, collation_fn=default_collate, partial=False)
    )


def _to(device: torch.device, batch: Sequence[Sequence[Tensor]]) -> object:
    """Copies the views of a peer's batch to a GPU, where they are ready for the network."""
    if device.type == "cuda":
        for view in batch[0]:
            view.to(device, non_blocking=True)
    return batch


def compare_scaling(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second, steady state, for DINO: one trainer with more and more workers, then more and more trainers.

    Workers up to the number of cores, and as many trainers as have cores for their workers; two at least.
    """
    size, device, groups = config.chosen_size(), config.torch_device(), views_of(RECIPES["dino"])
    worker_counts = doublings(max(num_cores(), 2))
    process_counts = doublings(max(num_cores() // config.workers, 2))
    images = photographs(config, max(NUM_IMAGES[size], BATCH_SIZE[size] * process_counts[-1]))

    def comparison(of: str, place: str, setting: str) -> Comparison:
        setting = f"{total_views(groups)}, {setting}; {images.source}"
        return Comparison(f"scaling {of}, {TITLES[place]}", "images", setting, references=(f"{of}=1",), threads=1)

    with images.in_shards() as shards:
        for place in PLACES:
            read = DataConfig(shards=str(shards), batch_size=BATCH_SIZE[size], workers=config.workers, crop_on=place)
            trainer = comparison("workers", place, "one process")
            for count in worker_counts:
                source = OurInput(groups, read.model_copy(update={"workers": count}), device)
                _add(trainer, config, f"workers={count}", source.as_trained, turn=count)
            yield trainer
            world = comparison("processes", place, f"workers={config.workers} each")
            for count in process_counts:
                ranks = partial(batches_of_world, OurInput(groups, read, device), count)
                note = "all together; the CPU time is that of the measuring process, which counts their batches"
                _add(world, config, f"processes={count}", ranks, note, turn=count * config.workers)
            yield world


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**power for power in range(most.bit_length())]
