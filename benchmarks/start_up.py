"""How long one waits: for --help, for the first batch, for the first step of a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from benchmarks.images import load_images, views_of, write_shards
from benchmarks.input import SMALL
from benchmarks.rounds import Comparison, Contestant
from benchmarks.settings import BenchmarkConfig
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream

ROOT = Path(__file__).parents[1]
RECIPE = "digits_dino"


def compare_start_up(config: BenchmarkConfig) -> Iterator[Comparison]:
    """Seconds from a command to what one waits for; the imports of torch and timm are the floor."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_shards(load_images(config.cifar10, pixels=SMALL).spread_out(256), folder / "shards")
        settings = DataConfig(shards=str(shards), batch_size=64, workers=config.workers)
        run = folder / "run"

        def first_batch(number: int) -> int:
            stream = open_stream(
                open_shards(shards), views_of(RECIPE), settings, seed=0, position=0, rank=0, world_size=1
            )
            next(stream)
            return 1

        def first_step(number: int) -> int:
            rmtree(run, ignore_errors=True)
            keys = (f"recipe={RECIPE}", f"output={run}", f"data.shards={shards}", "knn=null")
            return _python("pretrain.py", *keys, "train.epochs=null", "train.steps=1")(number)

        contestants = [
            Contestant("import torch, timm", _python("-c", "import torch, timm"), note="the floor"),
            Contestant("pretrain.py --help", _python("pretrain.py", "--help")),
            Contestant("first batch", first_batch, note=f"open shards, start {config.workers} workers, one batch"),
            Contestant("run of one step", first_step, note=f"{RECIPE}: imports, network, batch, step, checkpoint"),
        ]
        yield Comparison("start-up", "starts", contestants)


def _python(*arguments: str) -> Callable[[int], int]:
    """A unit that runs this interpreter in the checkout; an error is the unit's."""

    def unit(number: int) -> int:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"{' '.join(arguments[:2])} exited with {done.returncode}: {last}")
        return 1

    return unit
