"""What grows with the data set and what does not: start-up, first batch, memory of a worker, work of a rank.

python -m benchmarks.cost_growth
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from pydantic import Field

from benchmarks.synthetic_shards import write_synthetic_shards
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import Config, run_command
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.shards.open import RawSample, ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream
from ssl_pipeline.files import JSON, write_json

GROUPS = {"view": ViewGroup(count=2, size=16)}
BATCH_SIZE = 64
SEED = 0
MEMORY_BATCHES = 300  # 19,200 samples, more than a block of 16 shards holds


class CostGrowth(Config):
    """Measure on made-up sets of shards, from few to many, what a larger set costs."""

    shards: tuple[Annotated[int, Field(ge=1)], ...] = (10, 1_000, 100_000)
    """Numbers of shards to start with, smallest first."""
    samples: tuple[Annotated[int, Field(ge=1_000)], ...] = (16_000, 16_000_000)
    """Numbers of samples, in shards of 1,000, to read from."""
    world_sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 8)
    """Numbers of processes that share an epoch."""
    rounds: Annotated[int, Field(ge=1)] = 5
    """Starts of each set, taken in turns."""
    folder: Path | None = None
    """Where the sets are written, and deleted again: some 10 KB per shard. By default the directory for such files."""
    output: Path | None = None
    """File for the result as JSON."""


def measure(config: CostGrowth | None = None) -> dict[str, JSON]:
    """All figures, and how much larger each is for the largest set than for the smallest."""
    config = config or CostGrowth()
    with TemporaryDirectory(dir=config.folder) as name:
        start_up = _start_up(config, Path(name))
        memory = _memory(config, Path(name))
        ranks = [_work_of_ranks(Path(name), world_size) for world_size in config.world_sizes]
    return {
        "start_up": start_up,
        "start_up_growth": _growth(start_up, "seconds"),
        "first_batch_growth": _growth(start_up, "first_batch_seconds"),
        "worker_memory": memory,
        "worker_memory_growth": _growth(memory, "own_megabytes"),
        "ranks": ranks,
    }


def _growth(rows: Sequence[JSON], key: str) -> float:
    """The largest set's figure over the smallest set's."""
    first, last = rows[0], rows[-1]
    assert isinstance(first, dict)
    assert isinstance(last, dict)
    return float(last[key]) / max(float(first[key]), 1e-9)


def _start_up(config: CostGrowth, folder: Path) -> list[JSON]:
    """Medians per set: `seconds` from nothing to an open set, imports included, and what of them opening took."""
    for shards in config.shards:
        write_synthetic_shards(folder / f"{shards}-shards", shards=shards, samples=16)
    taken: dict[int, list[dict[str, float]]] = {shards: [] for shards in config.shards}
    for number in range(config.rounds + 1):
        for shards, rows in taken.items():
            begin = time.monotonic()
            row = _in_new_process("report_start_up", folder / f"{shards}-shards", begin)
            if number:  # the first start compares with the manifest and keeps the outcome
                rows.append(row)
    return [
        {"shards": shards, **{name: statistics.median(row[name] for row in rows) for name in rows[0]}}
        for shards, rows in taken.items()
    ]


def report_start_up(folder: str, begin: str) -> None:
    """Print, as JSON, the seconds since `begin` until the set is open, and those until there is a batch."""
    imported, imported_cpu = time.monotonic(), time.process_time()
    index = open_shards(folder)
    opened, opened_cpu = time.monotonic(), time.process_time()
    batches = _batches(index, workers=1)
    next(batches)
    read = time.monotonic()
    row = {
        "seconds": opened - float(begin),
        "open_seconds": opened - imported,
        "first_batch_seconds": read - opened,
        "cpu_seconds": opened_cpu,
        "open_cpu_seconds": opened_cpu - imported_cpu,
    }
    print(json.dumps(row))


def _memory(config: CostGrowth, folder: Path) -> list[JSON]:
    """Megabytes of a worker that has read from more than one block, per number of samples."""
    rows: list[JSON] = []
    for samples in config.samples:
        place = folder / f"{samples}-samples"
        write_synthetic_shards(place, shards=samples // 1000, samples=1000)
        rows.append({"samples": samples, **_in_new_process("report_memory", place)})
    return rows


def report_memory(folder: str) -> None:
    """Print, as JSON, what /proc says of a worker: resident, and what of it is no other process's."""
    index = open_shards(folder)
    batches = _batches(index, workers=1)
    for _ in range(MEMORY_BATCHES):
        next(batches)
    own = Path("/proc/self/task")
    workers = [int(pid) for task in own.iterdir() for pid in (task / "children").read_text().split()]
    assert len(workers) == 1, workers
    lines = Path(f"/proc/{workers[0]}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    row = {
        "resident_megabytes": kilobytes["Rss"] / 1024,
        "own_megabytes": (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]) / 1024,
    }
    print(json.dumps(row))


def _work_of_ranks(folder: Path, world_size: int) -> dict[str, JSON]:
    """How many images each rank reads in an epoch, counted, and how many of all are read."""
    place = folder / "ranks"
    samples = 4 * BATCH_SIZE * 8
    if not place.exists():
        write_synthetic_shards(place, shards=16, samples=samples // 16)
    reads, seen = list[JSON](), set[int]()
    for rank in range(world_size):
        index = _CountingIndex.of(open_shards(place))
        batches = len(index) // (BATCH_SIZE * world_size)
        for batch in _batches(index, workers=0, rank=rank, world_size=world_size, batches=batches):
            seen.update(batch.sample_ids.tolist())
        reads.append(index.reads)
    return {"world_size": world_size, "samples": samples, "samples_read": len(seen), "reads_of_ranks": reads}


class _CountingIndex(ShardIndex):
    reads: int

    @classmethod
    def of(cls, index: ShardIndex) -> _CountingIndex:
        counting = cls.__new__(cls)
        counting.__dict__.update(index.__dict__, reads=0)
        return counting

    def read(self, sample: int) -> RawSample:
        self.reads += 1
        return super().read(sample)


def _batches(
    index: ShardIndex, *, workers: int, rank: int = 0, world_size: int = 1, batches: int | None = None
) -> Iterator[StreamBatch]:
    config = DataConfig(shards="", batch_size=BATCH_SIZE, workers=workers)
    return open_stream(index, GROUPS, config, seed=SEED, position=0, rank=rank, world_size=world_size, batches=batches)


def _in_new_process(function: str, *arguments: object) -> dict[str, float]:
    command = f"import sys; from benchmarks import cost_growth; cost_growth.{function}(*sys.argv[1:])"
    run = subprocess.run(
        [sys.executable, "-c", command, *map(str, arguments)], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(run.stdout)


def main(config: CostGrowth) -> None:
    """Print the figures."""
    result = measure(config)
    if config.output is not None:
        write_json(config.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(run_command(CostGrowth, main, command="python -m benchmarks.cost_growth"))
