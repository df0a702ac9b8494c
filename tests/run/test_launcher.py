"""A trainer notices the end of whatever launched it, at any time, and of nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssl_pipeline.run import launcher as module
from ssl_pipeline.run.launcher import LAUNCHED, find_launcher
from tests.runs import wait_until

ROOT = Path(__file__).parents[2]
TRAINER = """
import os, pathlib, sys, time
sys.path.insert(0, {root!r})
from ssl_pipeline.run.launcher import watch_launcher
watch_launcher()
pathlib.Path({pid!r}).write_text(str(os.getpid()))
time.sleep({seconds})
"""
LAUNCHER = "import subprocess, sys\nsubprocess.call([*{wrapper!r}, sys.executable, {trainer!r}])\n"
CLEAN = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "LOCAL_RANK")}


@contextmanager
def launched(
    folder: Path, name: str, *, wrapper: tuple[str, ...] = (), seconds: float = 30.0, **environment: str
) -> Iterator[tuple[subprocess.Popen, int]]:
    """A launcher called `name`, and the number of its trainer."""
    trainer, script, pid = folder / "trainer.py", folder / name, folder / "pid"
    trainer.write_text(TRAINER.format(root=str(ROOT), pid=str(pid), seconds=seconds))
    script.write_text(LAUNCHER.format(wrapper=list(wrapper), trainer=str(trainer)))
    process = subprocess.Popen([sys.executable, str(script), "launch"], env=CLEAN | environment)
    wait_until(lambda: pid.exists() and pid.read_text() != "")
    number = int(pid.read_text())
    try:
        yield process, number
    finally:
        process.kill()
        process.wait()
        if runs(number):
            os.kill(number, signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("name", ["accelerate", "torchrun"])
def test_the_trainer_ends_with_its_launcher(tmp_path, name, number):
    with launched(tmp_path, name) as (launcher, trainer):
        assert runs(trainer)
        launcher.send_signal(number)
        wait_until(lambda: not runs(trainer), timeout=5)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", LAUNCHED])
def test_a_launcher_is_known_by_what_it_sets(tmp_path, variable):
    with launched(tmp_path, "anything", **{variable: "1"}) as (launcher, trainer):
        launcher.kill()
        wait_until(lambda: not runs(trainer), timeout=5)


def test_a_launcher_is_noticed_through_a_script_of_the_user(tmp_path):
    wrapper = ("bash", "-c", '"$@"; exit', "wrapper")
    with launched(tmp_path, "accelerate", wrapper=wrapper) as (launcher, trainer):
        launcher.kill()  # not reaped: what is left of it is no launcher
        wait_until(lambda: not runs(trainer), timeout=5)


def test_the_end_of_a_shell_means_nothing(tmp_path):
    with launched(tmp_path, "shell", seconds=1.5) as (shell, trainer):
        shell.kill()
        shell.wait()
        with pytest.raises(AssertionError, match="did not happen"):
            wait_until(lambda: not runs(trainer), timeout=1.0)


@pytest.mark.parametrize(
    ("parent", "words", "variable", "ended"),
    [
        (1, ["init"], "ACCELERATE_DYNAMO_MODE", True),
        (1, ["init"], "TORCHELASTIC_RUN_ID", True),
        (900, ["systemd", "--user"], "TORCHELASTIC_RUN_ID", True),
        (1, ["init"], LAUNCHED, True),
        (1, ["init"], "ACCELERATE_USE_CPU", None),  # left over in a shell: nohup, and the shell has ended
        (1, ["python", "own_launcher.py"], "TORCHELASTIC_RUN_ID", False),
        (1, ["accelerate", "launch"], "ACCELERATE_DYNAMO_MODE", False),
    ],
)
def test_a_launcher_that_ended_before_anybody_looked(monkeypatch, parent, words, variable, ended):
    monkeypatch.setattr(module.os, "getppid", lambda: parent)
    monkeypatch.setattr(module, "_names", lambda pid: words if pid == parent else [])
    monkeypatch.setattr(module, "parent_of", lambda _: 0)
    found = find_launcher({variable: "1"})
    assert (None if found is None else not found.is_alive()) == ended
