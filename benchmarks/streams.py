"""Streams of batches as a trainer takes them, measured in their steady state, and those of several trainers at once.

`scaling` is our input alone, against the number of worker and of training processes.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from typing import Literal

import torch

from benchmarks.images import images_for, total_views, views_of
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig, Size
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import Batch
from ssl_pipeline.data.batches import StreamBatch, make_batch
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream
from ssl_pipeline.machine import whole_cores

BATCH_SIZE: dict[Size, int] = {"tiny": 2, "small": 64, "large": 64}
NUM_IMAGES: dict[Size, int] = {"tiny": 8, "small": 128, "large": 512}
Batches = Callable[[], Iterator[object]]

UNIT_SECONDS: dict[Size, float] = {"tiny": 0.01, "small": 1.5, "large": 4.0}
# Imports once, then forks processes that know nothing of this one's threads and GPU.
START: Literal["forkserver"] = "forkserver"

PLACES: dict[Literal["worker", "device"], tuple[str, str]] = {
    "worker": ("crops", "8-bit crops; colours are left to the device"),
    "device": ("decode only", "crops and colours are left to the device"),
}
"""By the place of the crop: what that is called, and what is done before a batch is there."""


@dataclass(frozen=True)
class OurInput:
    """Batches of these views by our pipeline."""

    groups: Mapping[str, ViewGroup]
    settings: DataConfig
    device: torch.device | str = "cpu"

    def stream(self, *, rank: int = 0, world_size: int = 1) -> Iterator[StreamBatch]:
        """The endless stream of one rank."""
        index = open_shards(self.settings.shards)
        stream = partial(open_stream, index, self.groups, self.settings, seed=0, position=0)
        return stream(rank=rank, world_size=world_size, device=self.device)

    def views(self, batch: StreamBatch) -> Batch:
        """All that the training process does to a batch of the stream before the network gets it."""
        on_device = batch.to(self.device, non_blocking=True)
        return make_batch(on_device, self.groups, mean=self.settings.mean, std=self.settings.std, compile=True)

    def as_trained(self, *, rank: int = 0, world_size: int = 1) -> Iterator[object]:
        """The stream as a trainer takes it: on a GPU with crops and colours."""
        for batch in self.stream(rank=rank, world_size=world_size):
            yield self.views(batch) if torch.device(self.device).type == "cuda" else batch


class Steady:
    """Opens a stream of batches, draws for about `seconds`, in whole turns, and then as long again, which counts.

    Before that each worker has touched the memory that it writes to, or it would be the kernel that is measured.
    The trainer is always the one that waits, so what is under way when the clock starts is also when it stops. A turn
    is as many batches as there are workers: those of one turn tend to arrive together.
    """

    def __init__(self, batches: Batches, *, batch_size: int, turn: int, seconds: float) -> None:
        self.batches, self.batch_size, self.turn, self.seconds = batches, batch_size, turn, seconds
        self.stream: Iterator[object] = iter(())

    @contextmanager
    def opened(self) -> Iterator[None]:
        self.stream = self.batches()
        try:
            self.draw()
            yield
        finally:
            self.stream = iter(())  # which ends the workers

    def draw(self) -> int:
        """Draw whole turns; returns how many images they had."""
        turns, end = 0, time.perf_counter() + self.seconds
        while turns == 0 or time.perf_counter() < end:
            for _ in range(self.turn):
                next(self.stream)
            turns += 1
        return turns * self.turn * self.batch_size


def add_steady(comparison: Comparison, size: Size, name: str, batches: Batches, note: str = "", *, turn: int) -> None:
    """One more contestant, which draws batches of BATCH_SIZE images."""
    source = Steady(batches, batch_size=BATCH_SIZE[size], turn=turn, seconds=UNIT_SECONDS[size])
    comparison.contestants.append(Contestant(name, source.draw, note, session=source.opened))


def compare_scaling(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second, steady state, for DINO: one trainer with more and more workers, then more and more trainers.

    Workers up to the number of cores, and as many trainers as have cores for their workers; two at least.
    """
    size, device, groups = config.chosen_size(), config.torch_device(), views_of("dino_vits16")
    worker_counts = doublings(max(whole_cores(), 2))
    process_counts = doublings(max(whole_cores() // config.workers, 2))
    images = images_for(config, max(NUM_IMAGES[size], BATCH_SIZE[size] * process_counts[-1]))

    def comparison(of: str, title: str, setting: str) -> Comparison:
        setting = f"{total_views(groups)}, {setting}; {images.source}"
        return Comparison(f"scaling {of}, {title}", "images", setting, references=(f"{of}=1",), threads=1)

    with images.in_shards() as shards:
        for place, (title, _) in PLACES.items():
            read = DataConfig(shards=str(shards), batch_size=BATCH_SIZE[size], workers=config.workers, crop_on=place)
            trainer = comparison("workers", title, "one process")
            for count in worker_counts:
                source = OurInput(groups, read.model_copy(update={"workers": count}), device)
                add_steady(trainer, size, f"workers={count}", source.as_trained, turn=count)
            yield trainer
            world = comparison("processes", title, f"workers={config.workers} each")
            for count in process_counts:
                ranks = partial(batches_of_world, OurInput(groups, read, device), count)
                note = "all together; the CPU time is that of the measuring process, which counts their batches"
                add_steady(world, size, f"processes={count}", ranks, note, turn=count * config.workers)
            yield world


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**power for power in range(most.bit_length())]


def batches_of_world(source: OurInput, world_size: int) -> Iterator[None]:
    """One item per batch that any rank of a world got, as they come, once each rank's workers could deliver once.

    The ranks are processes of their own that take batches without a pause, and end with the iterator.
    """
    context = multiprocessing.get_context(START)
    context.set_forkserver_preload([__name__])
    end, (ours, theirs) = context.Event(), context.Pipe(duplex=False)
    take = partial(_take_batches, source, world_size, theirs, end)
    ranks = [context.Process(target=take, args=(rank,)) for rank in range(world_size)]
    delivered = [0] * world_size
    try:
        for process in ranks:
            process.start()
        while True:
            if ours not in wait([ours, *(process.sentinel for process in ranks)]):
                raise RuntimeError("A rank ended before the measurement did; its error stands above")
            delivered[ours.recv_bytes()[0]] += 1
            if min(delivered) > source.settings.workers:
                yield
    finally:
        end.set()
        for process in ranks:
            process.join()


def _take_batches(source: OurInput, world_size: int, connection: Connection, end: Event, rank: int) -> None:
    """One rank: its number for each batch, until the measurement ends."""
    torch.set_num_threads(1)
    if torch.device(source.device).type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    for _ in source.as_trained(rank=rank, world_size=world_size):
        connection.send_bytes(bytes([rank]))
        if end.is_set():
            break
