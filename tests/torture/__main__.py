"""`make torture`, or `python -m tests.torture [only=kills,faults,inputs,bytes] [rounds=20] [cases=1000] [seed=0]`.

Tries what docs/reliability.md promises, on tiny data, and prints a table; the exit code is 1 if a promise was broken.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from ssl_pipeline.config import Config, Seed, printable, run_command
from tests.torture.faults import torture_faults
from tests.torture.inputs import torture_inputs
from tests.torture.kills import torture_kills
from tests.torture.mutations import torture_bytes
from tests.torture.outcome import Outcome, table

METHODS = ("dino", "moco", "fixmatch")  # a teacher and a centre; a queue; labelled images
NUM_PROCESSES = 2


class TortureConfig(Config):
    """Kill runs, damage what they read, ask for what is wrong; and count how often a promise was kept."""

    only: tuple[Literal["kills", "faults", "inputs", "bytes"], ...] = ("kills", "faults", "inputs", "bytes")
    """Which parts."""
    rounds: int = Field(20, ge=1, le=10**6)
    """Kills of each kind of run, and half as many of each fault."""
    cases: int = Field(1000, ge=1, le=10**9)
    """Damaged examples of each kind of bytes."""
    seed: Seed = 0
    """Seed of the moments, places and damages."""


def torture(config: TortureConfig) -> int:
    """Run the parts and print the table; the exit code is 1 if anything is broken."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        found = list(_parts(config, Path(place)))
    print(printable(table(found), longest=None, lines=True))
    print(f"\n{sum(outcome.tried for outcome in found):,} trials in {time.monotonic() - started:.0f} s")
    return int(any(outcome.broken for outcome in found))


def _parts(config: TortureConfig, folder: Path) -> Iterator[Outcome]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the runs are tiny
    if "kills" in config.only:
        for method in METHODS:
            yield torture_kills(folder / f"kills-{method}", kills=config.rounds, seed=config.seed, method=method)
        together = folder / "kills-together"
        yield torture_kills(together, kills=config.rounds, seed=config.seed, world_size=NUM_PROCESSES)
    if "faults" in config.only:
        yield from torture_faults(folder / "faults", rounds=max(config.rounds // 2, 1), seed=config.seed)
    if "inputs" in config.only:
        yield from torture_inputs(folder / "inputs")
    if "bytes" in config.only:
        yield from torture_bytes(folder / "bytes", cases=config.cases, seed=config.seed)


if __name__ == "__main__":
    sys.exit(run_command(TortureConfig, torture, command="python -m tests.torture"))
