"""How long one waits: for --help, for the first batch, for the first step of a run; and what grows with the data set.

`cost_growth` is start-up, first batch, memory of a worker and reads of a rank, on made-up sets of many sizes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.images import images_for, views_of
from benchmarks.made_up_shards import BATCH_SIZE, batches_of, write_made_up_shards
from benchmarks.report import Row, table_of
from benchmarks.rounds import Comparison
from benchmarks.settings import BenchmarkConfig
from benchmarks.streams import OurInput
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig

ROOT = Path(__file__).parents[1]
RECIPE = "digits_dino"
PROCESSES = (1, 2, 8)  # that share an epoch
MOST_ROUNDS = 3


class Growth(NamedTuple):
    """Numbers of shards to start with; numbers of samples, in shards of 1,000, to read from; smallest first."""

    shards: tuple[int, ...]
    samples: tuple[int, ...]
    batches: int  # more than a block of 16 shards holds


TINY, USUAL = Growth((4, 20), (2_000, 4_000), 3), Growth((10, 1_000, 100_000), (16_000, 16_000_000), 300)


def compare_start_up(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Seconds from a command to what one waits for; the imports of torch and timm are the floor."""
    comparison = Comparison("start-up", "starts", items=1)
    with TemporaryDirectory() as run, images_for(config, 256, small=True).in_shards() as shards:
        settings = DataConfig(shards=str(shards), batch_size=64, workers=config.workers)
        keys = (f"recipe={RECIPE}", f"output={run}", f"data.shards={shards}", "knn=null")

        def first_step() -> None:
            rmtree(run)
            run_python("pretrain.py", *keys, "train.steps=1")

        def first_batch() -> None:
            next(OurInput(views_of(RECIPE), settings).stream())

        comparison.add("import torch, timm", partial(run_python, "-c", "import torch, timm"), "the floor")
        comparison.add("pretrain.py --help", partial(run_python, "pretrain.py", "--help"))
        comparison.add("first batch", first_batch, f"open shards, start {config.workers} workers, one batch")
        comparison.add("run of one step", first_step, f"{RECIPE}: imports, network, batch, step, checkpoint")
        yield comparison


def run_python(*arguments: str) -> str:
    """What this interpreter prints in the checkout; raises RuntimeError with the last line if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{' '.join(arguments[:2])} exited with {done.returncode}: {last}")
    return done.stdout


def measure_growth(config: BenchmarkConfig) -> dict[str, list[Row]]:
    """The figures of each set, from the smallest to the largest."""
    sets = TINY if config.chosen_size() == "tiny" else USUAL
    with TemporaryDirectory() as name:
        start_up = measure_start_up(Path(name), sets.shards, rounds=min(config.rounds, MOST_ROUNDS))
        memory: list[Row] = []  # megabytes of a worker that has read from more than one block
        for samples in sets.samples:
            place = Path(name, f"{samples}-samples")
            write_made_up_shards(place, shards=samples // 1000, samples=1000)
            memory.append({"samples": samples, **_in_new_process("report_memory", place, sets.batches)})
        ranks = [count_reads(Path(name), world_size) for world_size in PROCESSES]
    return {"start_up": start_up, "worker_memory": memory, "ranks": ranks}


def measure_start_up(folder: Path, shard_counts: Sequence[int], *, rounds: int) -> list[Row]:
    """Medians per set: `seconds` from nothing to an open set, imports included, and what of them opening took."""
    sets = {shards: folder / f"{shards}-shards" for shards in shard_counts}
    for shards, place in sets.items():
        write_made_up_shards(place, shards=shards, samples=BATCH_SIZE // 4)
    starts = [
        [_in_new_process("report_start_up", place, time.monotonic()) for place in sets.values()]
        for _ in range(rounds + 1)
    ]
    of_sets = zip(*starts[1:], strict=True)  # the first start compares with the manifest and keeps the outcome
    return [
        {"shards": shards, **{name: median(row[name] for row in rows) for name in rows[0]}}
        for shards, rows in zip(sets, of_sets, strict=True)
    ]


def count_reads(folder: Path, world_size: int) -> Row:
    """How many images each rank reads in an epoch, counted, and how many of all are read."""
    place, samples = folder / "ranks", 4 * BATCH_SIZE * max(PROCESSES)
    if not place.exists():
        write_made_up_shards(place, shards=16, samples=samples // 16)
    reads: list[Any] = []
    seen: set[int] = set()
    for rank in range(world_size):
        index = open_shards(place)
        with patch.object(index, "read", wraps=index.read) as read:
            own = samples // BATCH_SIZE // world_size
            for batch in batches_of(index, rank=rank, world_size=world_size, batches=own):
                seen.update(batch.sample_ids.tolist())
        reads.append(read.call_count)
    return {"world_size": world_size, "samples": samples, "samples_read": len(seen), "reads_of_ranks": reads}


def _in_new_process(function: str, *arguments: object) -> dict[str, float]:
    command = f"import sys; from benchmarks import made_up_shards; made_up_shards.{function}(*sys.argv[1:])"
    return json.loads(run_python("-c", command, *map(str, arguments)))


def growth_table(figures: Mapping[str, Sequence[Row]]) -> str:
    """Start-up and memory, one row per size of the data set."""
    titles = {"cost growth: start-up": "start_up", "cost growth: memory of a worker": "worker_memory"}
    return "\n\n".join(table_of(title, figures[part]) for title, part in titles.items())
