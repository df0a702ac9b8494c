"""Images per second of our input against the number of worker processes, and against that of training processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from benchmarks.end_to_end import BATCH_SIZE, NUM_IMAGES, RECIPES, UNIT_SECONDS, Steady, our_batches
from benchmarks.hardware import num_cores
from benchmarks.images import load_images, total_views, views_of, write_shards
from benchmarks.input import PHOTOGRAPH, PLACES
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.stream import DataConfig

# Imports once, then forks processes that know nothing of this one's threads and GPU.
START: Literal["forkserver"] = "forkserver"
TITLES = {"worker": "crops", "device": "decode only"}


def compare_scaling(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Images per second, steady state, for DINO: one trainer with more and more workers, then more and more trainers.

    Workers up to the number of cores, and as many trainers as have cores for their workers; two at least.
    """
    size, device, groups = config.chosen_size(), config.torch_device(), views_of(RECIPES["dino"])
    worker_counts = doublings(max(num_cores(), 2))
    process_counts = doublings(max(num_cores() // config.workers, 2))
    num_images = max(NUM_IMAGES[size], BATCH_SIZE[size] * process_counts[-1])
    images = load_images(config.imagenet, pixels=PHOTOGRAPH).spread_out(num_images)

    def contestant(name: str, batches: Callable[[], Iterator[object]], *, turn: int, note: str = "") -> Contestant:
        source = Steady(batches, batch_size=BATCH_SIZE[size], turn=turn, seconds=UNIT_SECONDS[size])
        return Contestant(name, source.draw, session=source.opened, note=note)

    def comparison(name: str, contestants: Sequence[Contestant], setting: str) -> Comparison:
        setting = f"{total_views(groups)}, {setting}; {images.source}"
        return Comparison(name, "images", contestants, (contestants[0].name,), threads=1, setting=setting)

    with TemporaryDirectory() as folder:
        shards = write_shards(images, Path(folder) / "shards")
        for place in PLACES:
            read = DataConfig(shards=str(shards), batch_size=BATCH_SIZE[size], workers=config.workers, crop_on=place)
            trainers = [
                contestant(
                    f"workers={count}",
                    partial(our_batches, groups, read.model_copy(update={"workers": count}), device),
                    turn=count,
                )
                for count in worker_counts
            ]
            yield comparison(f"scaling workers, {TITLES[place]}", trainers, "one process")
            worlds = [
                contestant(
                    f"processes={count}",
                    partial(batches_of_world, groups, read, device, count),
                    turn=count * config.workers,
                    note="all together; the CPU time is that of the measuring process, which counts their batches",
                )
                for count in process_counts
            ]
            yield comparison(f"scaling processes, {TITLES[place]}", worlds, f"workers={config.workers} each")


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**power for power in range(most.bit_length())]


def batches_of_world(
    groups: Mapping[str, ViewGroup], settings: DataConfig, device: torch.device, world_size: int
) -> Iterator[None]:
    """One item per batch that any rank of a world got, as they come, once each rank's workers could deliver once.

    The ranks are processes of their own that take batches without a pause, and end with the iterator.
    """
    context = multiprocessing.get_context(START)
    context.set_forkserver_preload([__name__])
    delivered: dict[Connection, int] = {}
    ranks = []
    try:
        for rank in range(world_size):
            connection, theirs = context.Pipe()
            arguments = (theirs, groups, settings, device, rank, world_size)
            process = context.Process(target=_take_batches, args=arguments)
            process.start()
            theirs.close()
            ranks.append(process)
            delivered[connection] = 0
        while True:
            for ready in wait(list(delivered)):
                assert isinstance(ready, Connection)
                _receive(ready)
                delivered[ready] += 1
                if min(delivered.values()) > settings.workers:
                    yield
    finally:
        for connection in delivered:
            with suppress(BrokenPipeError):  # a rank that failed has ended before
                connection.send_bytes(b"end")
        for process in ranks:
            process.join()


def _receive(connection: Connection) -> None:
    try:
        connection.recv_bytes()
    except (EOFError, ConnectionResetError):
        raise RuntimeError("A rank ended before the measurement did; its error stands above") from None


def _take_batches(
    connection: Connection,
    groups: Mapping[str, ViewGroup],
    settings: DataConfig,
    device: torch.device,
    rank: int,
    world_size: int,
) -> None:
    """One rank: a message for each batch, until there is one from the other side."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    for _ in our_batches(groups, settings, device, rank=rank, world_size=world_size):
        connection.send_bytes(b"batch")
        if connection.poll():
            break
