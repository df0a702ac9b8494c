"""Runs that are killed and stopped at any moment, and started again: they end as a run left alone does, to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tests.ranks import TIMEOUT, Child, start, start_ranks
from tests.runs import command, equal, final_state, losses, rows, status, write_recipe
from tests.tiny import write_shards
from tests.torture.outcome import Outcome

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # the hardest most often
MOST_STARTS = 60
WAIT, HANGS = 4 * TIMEOUT, "still running"  # seconds for the end of a start
PATIENCE = 30.0  # seconds that torchrun gives the others when one has ended with an error
STEPS = 24
PROMISE = "ends bit for bit as a run that nobody disturbed"


def torture_kills(folder: Path, *, kills: int, seed: int, method: str = "dino", world_size: int = 1) -> Outcome:
    """Kill runs `kills` times in all; a run that has reached its end is compared, and another one begins."""
    draws = random.Random(f"{seed} {method} {world_size}")
    recipe = _recipe(folder, method, world_size)
    expected = folder / "expected"
    start(os.getpid).wait()  # the server that forks the others has imported torch before the clock runs
    began = time.monotonic()
    assert _codes(_start(recipe, expected, world_size)) == {0}
    seconds = time.monotonic() - began
    processes = f", {world_size} processes" if world_size > 1 else ""
    outcome = Outcome(f"kills of {method}{processes}", PROMISE)
    number = 0
    while outcome.tried < kills and number < 10 * kills:
        output = folder / f"run-{number}"
        killed = _killed_until_done(recipe, output, world_size, draws, seconds, most=kills - outcome.tried)
        failure = killed if isinstance(killed, str) else _difference(output, expected)
        if failure is not None:
            outcome.count(f"run {number} of seed {seed}: {failure}")
        elif isinstance(killed, int):
            outcome.tried += killed  # none, where each signal came after the end
        number += 1
    return outcome


def _recipe(folder: Path, method: str, world_size: int) -> str:
    shards = write_shards(folder / "shards")
    train = {"steps": STEPS, "save_every": 3, "log_every": 1, "hang_timeout": 0, "check_ranks": 1}
    path = write_recipe(folder / "recipe.yaml", method, shards, train=train)
    text = path.read_text().replace("batch_size: 8", f"batch_size: {8 // world_size}")
    path.write_text(text)
    return f"recipe={path}"


def _start(recipe: str, output: Path, world_size: int) -> list[Child]:
    argv = [recipe, f"output={output}"]
    return [start(command, argv)] if world_size == 1 else start_ranks(command, argv, world_size=world_size)


def _killed_until_done(
    recipe: str, output: Path, world_size: int, draws: random.Random, seconds: float, *, most: int
) -> int | str:
    """How many kills a run took until its end, at most `most`; or what went wrong."""
    killed = 0
    for _ in range(MOST_STARTS):
        children = _start(recipe, output, world_size)
        if killed >= most:
            codes = _codes(children)
            return killed if codes == {0} else f"the last start ended with {codes}: {children[0].printed()[-300:]}"
        time.sleep(draws.uniform(0.0, 0.9 * seconds))
        victim, number = draws.choice(children), draws.choice(SIGNALS)
        if victim.process.exitcode is None:
            os.kill(victim.pid, number)
            killed += 1
        if world_size > 1:
            _end_the_others(victim, children, patience=0.0 if number == signal.SIGKILL else PATIENCE)
        codes = _codes(children)
        if HANGS in codes:
            return f"still running {WAIT:.0f} s after {number!r}: {children[0].printed()[-300:]}"
        traces = [child.printed() for child in children if "Traceback" in child.printed()]
        if traces:
            return f"a traceback after {number!r}: {traces[0][-300:]}"
        if codes == {0}:
            return killed
    return f"no end after {MOST_STARTS} starts"


def _end_the_others(victim: Child, children: list[Child], *, patience: float) -> None:
    """As a launcher does once a process has ended with an error: one that was stopped before it met the others has
    told them nothing.
    """
    victim.process.join(WAIT)
    if victim.process.exitcode in (None, 0):
        return
    for child in children:
        child.process.join(patience)
        if child.process.exitcode is None:
            child.process.kill()


def _codes(children: list[Child]) -> set[int | str]:
    """The exit codes; a process that does not end is killed."""
    codes: set[int | str] = set()
    for child in children:
        try:
            codes.add(child.wait(WAIT))
        except AssertionError:
            codes.add(HANGS)
    return codes


def _difference(output: Path, expected: Path) -> str | None:
    """What of a finished run is not as in the other one."""
    if status(output)["state"] != "done":
        return f"its status is {status(output)}"
    if not equal(final_state(output), final_state(expected)):
        return "the tensors of its last checkpoint are others"
    if losses(output) != losses(expected):
        return "metrics.jsonl has other losses"
    if [row["step"] for row in rows(output)] != list(range(1, STEPS + 1)):
        return "metrics.jsonl does not have each step once"
    if (output / "backbone.safetensors").read_bytes() != (expected / "backbone.safetensors").read_bytes():
        return "the exported backbone is another one"
    leftover = [path.name for path in (output / "checkpoints").iterdir() if path.name.startswith(".tmp")]
    return f"left over: {leftover}" if leftover else None
