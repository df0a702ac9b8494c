"""Faults of the machine and of files under a run: it goes on, or ends in one sentence that says what to do."""

from __future__ import annotations

import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.ranks import start
from tests.runs import Happening, command, equal, final_state, losses, status, write_recipe
from tests.tiny import write_shards
from tests.torture.outcome import Outcome

PROMISE = "goes on to the same end, or one sentence"
GOES_ON, TOLD, EITHER = "goes on", "told", "either"


class Place:
    """A run that was stopped in the middle, to be copied and damaged, and the same run left alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = write_shards(folder / "shards")
        train = {"steps": 12, "save_every": 2, "log_every": 1, "hang_timeout": 0}
        self.recipe = f"recipe={write_recipe(folder / 'recipe.yaml', 'dino', self.shards, train=train)}"
        self.expected, self.stopped = folder / "expected", folder / "stopped"
        assert start(command, [self.recipe, f"output={self.expected}"]).wait() == 0
        child = start(command, [self.recipe, f"output={self.stopped}"], Happening("SIGTERM", at=6))
        assert child.wait() == 128 + signal.SIGTERM

    def copy(self, name: str) -> Path:
        output = self.folder / name
        shutil.copytree(self.stopped, output)
        return output

    def go_on(self, output: Path, *argv: str, happening: Happening | None = None) -> tuple[int, str]:
        child = start(command, [self.recipe, f"output={output}", *argv], happening)
        return child.wait(), child.printed()

    def is_as_expected(self, output: Path) -> bool:
        done = status(output)["state"] == "done"
        return (
            done and equal(final_state(output), final_state(self.expected)) and losses(output) == losses(self.expected)
        )


def torture_faults(folder: Path, *, rounds: int, seed: int) -> list[Outcome]:
    """Each fault `rounds` times, at places drawn from the seed."""
    place, outcomes = Place(folder), []
    for name, (expected, fault) in FAULTS.items():
        outcome = Outcome(name, PROMISE)
        for number in range(rounds):
            output = place.copy(f"{name.replace(' ', '-')}-{number}")
            code, printed = fault(place, output, random.Random(f"{seed} {name} {number}"))
            outcome.count(_failure(place, output, code, printed, expected))
            shutil.rmtree(output)
        outcomes.append(outcome)
    return outcomes


def _failure(place: Place, output: Path, code: int, printed: str, expected: str) -> str | None:
    if "Traceback" in printed:
        return f"a traceback: {printed[-300:]}"
    if expected == GOES_ON or (expected == EITHER and code == 0):
        if code:
            return f"exit code {code}: {printed[-300:]}"
        return None if place.is_as_expected(output) else "another end than the run left alone"
    errors = [line for line in printed.splitlines() if line.startswith("error")]
    if code not in (1, 2) or len(errors) != 1 or len(errors[0]) > 520:
        return f"exit code {code}, {len(errors)} errors: {printed[-300:]}"
    return None


def _files(output: Path) -> list[Path]:
    newest = max((output / "checkpoints").glob("step-*"))
    return sorted(newest.iterdir())


def cut_off(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """A file of the newest checkpoint loses its end."""
    file = draws.choice(_files(output))
    with file.open("r+b") as opened:
        opened.truncate(draws.randrange(file.stat().st_size))
    return place.go_on(output)


def flip(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """A bit of a tensor file of the newest checkpoint turns over."""
    file = draws.choice([path for path in _files(output) if path.suffix == ".safetensors"])
    content = bytearray(file.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    file.write_bytes(content)
    return place.go_on(output)


def lose_a_file(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """A file of the newest checkpoint is gone."""
    draws.choice(_files(output)).unlink()
    return place.go_on(output)


def lose_all(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """All checkpoints are gone."""
    shutil.rmtree(output / "checkpoints")
    return place.go_on(output)


def damage_all(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """All checkpoints are damaged."""
    for file in (output / "checkpoints").glob("step-*/manifest.json"):
        file.write_bytes(file.read_bytes()[: draws.randrange(20)])
    return place.go_on(output)


def lose_metrics(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """The last row of metrics.jsonl is half written, as after a power cut."""
    file = output / "metrics.jsonl"
    content = file.read_bytes()
    file.write_bytes(content + b'{"step": 7, "ep')
    return place.go_on(output)


def no_room(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """No file can grow beyond some kilobytes, as on a full disk."""
    child = start(limited, [place.recipe, f"output={output}"], draws.choice((1, 10, 40)) << 10)
    return child.wait(), child.printed()


def limited(argv: list[str], most_bytes: int) -> None:
    """The command where files stay small."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of a signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    command(argv)


def few_files(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """The process may open few files."""
    child = start(with_few_files, [place.recipe, f"output={output}"], draws.randrange(1, 6))
    return child.wait(), child.printed()


def with_few_files(argv: list[str], more: int) -> None:
    """The command with so many files more than are open already."""
    now = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + more, now + more))
    command(argv)


def kill_a_worker(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """A process that reads images dies."""
    return place.go_on(output, "data.workers=2", happening=Happening("kill a worker", at=draws.randrange(1, 4)))


def broken_views(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """A batch is not finite."""
    return place.go_on(output, happening=Happening("nan", at=draws.randrange(4)))


def lose_a_shard(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """A shard is gone when the run is started again."""
    shard = draws.choice(sorted(place.shards.glob("*.tar")))
    content = shard.read_bytes()
    shard.unlink()
    try:
        return place.go_on(output)
    finally:
        shard.write_bytes(content)


def another_run_there(place: Place, output: Path, draws: random.Random) -> tuple[int, str]:
    """The directory is that of a run with other settings."""
    return place.go_on(output, draws.choice(("seed=1", "method.num_prototypes=13", "augment.global.size=12")))


FAULTS: dict[str, tuple[str, Callable[[Place, Path, random.Random], tuple[int, str]]]] = {
    "checkpoint cut off": (GOES_ON, cut_off),
    "checkpoint with a flipped bit": (GOES_ON, flip),
    "checkpoint without a file": (GOES_ON, lose_a_file),
    "half a row of metrics": (GOES_ON, lose_metrics),
    "no checkpoint left": (TOLD, lose_all),
    "every checkpoint damaged": (TOLD, damage_all),
    "full disk": (TOLD, no_room),
    "too many open files": (EITHER, few_files),
    "worker killed": (EITHER, kill_a_worker),
    "batch that is not finite": (TOLD, broken_views),
    "shard gone": (TOLD, lose_a_shard),
    "directory of another run": (TOLD, another_run_there),
}
