"""Images on disk -> batches in the trainer, through worker processes; how much of its own time the trainer spends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets import ImageFolder

from benchmarks.images import Images, load_images, total_views, views_of, write_folder, write_shards
from benchmarks.input import PHOTOGRAPH
from benchmarks.peer_views import lightly_views
from benchmarks.peers import missing
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig, Size
from benchmarks.torchvision_views import official_views
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.batches import make_batch
from ssl_pipeline.data.decode import decode_image
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream

RECIPES = {"dino": "dino_vits16", "mae": "mae_vitb16"}
BATCH_SIZE: dict[Size, int] = {"tiny": 2, "small": 64, "large": 64}
UNIT_SECONDS: dict[Size, float] = {"tiny": 0.01, "small": 1.5, "large": 4.0}
NUM_IMAGES: dict[Size, int] = {"tiny": 8, "small": 128, "large": 512}

Transform = Callable[[Image.Image], object]


def compare_end_to_end(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second that reach the trainer from `workers` processes, steady state, for DINO and MAE."""
    images = load_images(config.imagenet, pixels=PHOTOGRAPH).spread_out(NUM_IMAGES[config.chosen_size()])
    for name, recipe in RECIPES.items():
        groups = views_of(recipe)
        with TemporaryDirectory() as folder:
            left_out = missing("lightly")
            contestants = _contestants(config, images, groups, Path(folder), left_out)
            yield Comparison(
                f"end to end {name}",
                "images",
                contestants,
                references=("official", "decode and drop"),
                left_out=left_out,
                threads=1,
                setting=f"{total_views(groups)}, {config.workers} workers; {images.source}",
            )


def _contestants(
    config: BenchmarkConfig,
    images: Images,
    groups: Mapping[str, ViewGroup],
    folder: Path,
    left_out: Mapping[str, str],
) -> list[Contestant]:
    size, device = config.chosen_size(), config.torch_device()
    shards, files = write_shards(images, folder / "shards"), write_folder(images, folder / "files")
    batch_size = min(BATCH_SIZE[size], len(images.files))

    def contestant(name: str, batches: Callable[[], Iterator[object]], note: str) -> Contestant:
        source = Steady(batches, batch_size=batch_size, turn=config.workers, seconds=UNIT_SECONDS[size])
        return Contestant(name, source.draw, session=source.opened, note=note)

    def peer(name: str, dataset: Dataset[object], note: str) -> Contestant:
        return contestant(name, lambda: map(_to(device), _loader(dataset, config, batch_size)), note)

    def ours(name: str, place: Literal["worker", "device"], note: str) -> Contestant:
        settings = DataConfig(shards=str(shards), batch_size=batch_size, workers=config.workers, crop_on=place)
        return contestant(name, lambda: our_batches(groups, settings, device), note)

    contestants = [
        peer("official", ImageFolder(str(files), official_views(groups)), "ImageFolder, Pillow, DataLoader"),
        contestant(
            "webdataset",
            lambda: map(_to(device), _webdataset(shards, official_views(groups), config, batch_size)),
            "the same transforms behind webdataset's reader",
        ),
        ours("ours, crops", "worker", "8-bit crops; colours are left to the device"),
        ours("ours, decode only", "device", "crops and colours are left to the device"),
    ]
    if "lightly" not in left_out:
        contestants.insert(2, peer("lightly", ImageFolder(str(files), lightly_views(groups)), "ImageFolder"))
    drop = contestant(
        "decode and drop",
        lambda: _loader(_Dropped(images), config, batch_size),
        "our decoder, no pixel leaves the worker: the ceiling",
    )
    return [*contestants, drop]


class Steady:
    """Opens a stream of batches, draws for about `seconds`, in whole turns, and then as long again, which counts.

    Before that each worker has touched the memory that it writes to, or it would be the kernel that is measured.
    The trainer is always the one that waits, so what is under way when the clock starts is also when it stops. A turn
    is as many batches as there are workers: those of one turn tend to arrive together.
    """

    def __init__(self, batches: Callable[[], Iterator[object]], *, batch_size: int, turn: int, seconds: float) -> None:
        self.batches, self.batch_size, self.turn, self.seconds = batches, batch_size, turn, seconds
        self.stream: Iterator[object] = iter(())

    @contextmanager
    def opened(self) -> Iterator[None]:
        self.stream = self.batches()
        try:
            self.draw(0)
            yield
        finally:
            self.stream = iter(())  # which ends the workers

    def draw(self, number: int) -> int:
        turns, end = 0, time.perf_counter() + self.seconds
        while turns == 0 or time.perf_counter() < end:
            self._draw_turn()
            turns += 1
        return turns * self.turn * self.batch_size

    def _draw_turn(self) -> None:
        for _ in range(self.turn):
            next(self.stream)


def our_batches(
    groups: Mapping[str, ViewGroup], settings: DataConfig, device: torch.device, *, rank: int = 0, world_size: int = 1
) -> Iterator[object]:
    """Our stream as a trainer takes it: on a GPU with crops and colours."""
    index = open_shards(settings.shards)
    stream = open_stream(index, groups, settings, seed=0, position=0, rank=rank, world_size=world_size, device=device)
    for batch in stream:
        if device.type == "cuda":
            make_batch(batch.to(device, non_blocking=True), groups, mean=settings.mean, std=settings.std)
        yield batch


class _Dropped(Dataset[int]):
    """Decodes each image and keeps nothing of it."""

    def __init__(self, images: Images) -> None:
        self.files = images.files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> int:
        decode_image(self.files[number])
        return 0


class _Endless(Sampler[int]):
    """0 to count - 1, again and again: the same images for all, however many a contestant gets through."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return cycle(range(self.count))


def _loader(dataset: Dataset[object], config: BenchmarkConfig, batch_size: int) -> Iterator[object]:
    """Endless batches by torch's DataLoader."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=_Endless(len(dataset)),  # type: ignore[arg-type]
        num_workers=config.workers,
        pin_memory=config.torch_device().type == "cuda",
        drop_last=True,
    )
    return iter(loader)


def _webdataset(shards: Path, transform: Transform, config: BenchmarkConfig, batch_size: int) -> Iterator[object]:
    """The same of webdataset's reader, which shuffles within a buffer."""
    dataset = (
        webdataset.WebDataset(
            sorted(map(str, shards.glob("*.tar"))), resampled=True, nodesplitter=None, shardshuffle=False
        )
        .shuffle(64)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(batch_size, collation_fn=default_collate, partial=False)
    )
    pinned = config.torch_device().type == "cuda"
    return iter(DataLoader(dataset, batch_size=None, num_workers=config.workers, pin_memory=pinned))


def _to(device: torch.device) -> Callable[[object], object]:
    """Copies the views of a peer's batch to a GPU, where they are ready for the network."""

    def copied(batch: object) -> object:
        if device.type == "cuda":
            assert isinstance(batch, list | tuple)
            for view in batch[0]:
                view.to(device, non_blocking=True)
        return batch

    return copied
