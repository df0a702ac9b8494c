"""What a process of its own reports of a set of shards; apart, since its imports are part of what is measured."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream

BATCH_SIZE = 64


def report_start_up(folder: str, begin: str) -> None:
    """Print, as JSON, the seconds since `begin` until the set is open, and those until there is a batch."""
    imported, imported_cpu = time.monotonic(), time.process_time()
    index = open_shards(folder)
    opened, opened_cpu = time.monotonic(), time.process_time()
    batches = batches_of(index, workers=1)
    next(batches)
    row = {
        "seconds": opened - float(begin),
        "open_seconds": opened - imported,
        "first_batch_seconds": time.monotonic() - opened,
        "cpu_seconds": opened_cpu,
        "open_cpu_seconds": opened_cpu - imported_cpu,
    }
    print(json.dumps(row))


def report_memory(folder: str, batches: str) -> None:
    """Print, as JSON, what /proc says of a worker: resident, and what of it is no other process's."""
    stream = batches_of(open_shards(folder), workers=1)
    for _ in range(int(batches)):
        next(stream)
    own = Path("/proc/self/task")
    (worker,) = [int(pid) for task in own.iterdir() for pid in (task / "children").read_text().split()]
    lines = Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    row = {
        "resident_megabytes": kilobytes["Rss"] / 1024,
        "own_megabytes": (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]) / 1024,
    }
    print(json.dumps(row))


def batches_of(
    index: ShardIndex, *, workers: int = 0, rank: int = 0, world_size: int = 1, batches: int | None = None
) -> Iterator[StreamBatch]:
    """Small views of a set, as one rank gets them."""
    groups = {"view": ViewGroup(count=2, size=16)}
    config = DataConfig(shards="", batch_size=BATCH_SIZE, workers=workers)
    return open_stream(index, groups, config, seed=0, position=0, rank=rank, world_size=world_size, batches=batches)
