"""Our input as a trainer takes it, measured in its steady state, and that of several trainers at once."""

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

from benchmarks.settings import Size
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import Batch
from ssl_pipeline.data.batches import StreamBatch, make_batch
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream

UNIT_SECONDS: dict[Size, float] = {"tiny": 0.01, "small": 1.5, "large": 4.0}
# Imports once, then forks processes that know nothing of this one's threads and GPU.
START: Literal["forkserver"] = "forkserver"

PLACES: tuple[Literal["worker", "device"], ...] = ("worker", "device")
WORK = {"worker": "8-bit crops; colours are left to the device", "device": "crops and colours are left to the device"}
"""What is done before a batch is there, by the place of the crop."""
TITLES = {"worker": "crops", "device": "decode only"}


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
        return make_batch(on_device, self.groups, mean=self.settings.mean, std=self.settings.std)

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

    def __init__(self, batches: Callable[[], Iterator[object]], *, batch_size: int, turn: int, seconds: float) -> None:
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


def batches_of_world(source: OurInput, world_size: int) -> Iterator[None]:
    """One item per batch that any rank of a world got, as they come, once each rank's workers could deliver once.

    The ranks are processes of their own that take batches without a pause, and end with the iterator.
    """
    context = multiprocessing.get_context(START)
    context.set_forkserver_preload([__name__])
    end, (ours, theirs) = context.Event(), context.Pipe(duplex=False)
    ranks = [
        context.Process(target=_take_batches, args=(source, rank, world_size, theirs, end))
        for rank in range(world_size)
    ]
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


def _take_batches(source: OurInput, rank: int, world_size: int, connection: Connection, end: Event) -> None:
    """One rank: its number for each batch, until the measurement ends."""
    torch.set_num_threads(1)
    if torch.device(source.device).type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    for _ in source.as_trained(rank=rank, world_size=world_size):
        connection.send_bytes(bytes([rank]))
        if end.is_set():
            break
