"""`accelerate launch pretrain.py` as an operator stops it: nothing runs on, nothing is lost, the next start goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.runs import rows, status, wait_until, write_recipe
from tests.tiny import write_shards

ROOT = Path(__file__).parents[2]
ACCELERATE = [sys.executable, str(Path(sys.executable).with_name("accelerate")), "launch"]
ONE_PROCESS = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHERS = {"accelerate": [*ACCELERATE, *ONE_PROCESS], "torchrun": TORCHRUN}
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
pytestmark = [pytest.mark.slow, pytest.mark.ddp]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("recipe")
    shards = write_shards(folder / "shards")
    train = {"steps": 1_000_000, "save_every": 1_000_000, "log_every": 1}
    return f"recipe={write_recipe(folder / 'tiny.yaml', 'dino', shards, train=train)}"


@contextmanager
def launched(launcher: str, *argv: str, printed: Path) -> Iterator[subprocess.Popen]:
    """A launcher in a process group of its own."""
    command = [*LAUNCHERS[launcher], "pretrain.py", *argv]
    with printed.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        for pid in running(*argv):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def running(*argv: str) -> list[int]:
    """The processes with these arguments that are alive, launcher and trainers: each has a session of its own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text(errors="replace").split("\0")
            state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            continue
        if set(argv) <= set(words) and state not in "ZX":
            found.append(int(folder.name))
    return found


def has_rows(output: Path, number: int) -> bool:
    return len(rows(output)) >= number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_ends_in_training_leaves_a_saved_run(tmp_path, recipe, launcher, number):
    output, printed = tmp_path / "run", tmp_path / "printed"
    argv = [recipe, f"output={output}", "data.batch_size=4"]
    with launched(launcher, *argv, printed=printed) as process:
        wait_until(lambda: has_rows(output, 3), timeout=120)
        process.send_signal(number)
        wait_until(lambda: not running(f"output={output}"), timeout=30)
    state = status(output)
    assert state["state"] == "preempted", printed.read_text()
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{state['step']:08d}"]
    assert "signal 15" in state["reason"]
    with launched(launcher, *argv, f"train.steps={state['step'] + 2}", printed=printed) as process:
        assert process.wait(timeout=120) == 0, printed.read_text()
    assert f"Resuming after step {state['step']}" in printed.read_text()
    assert status(output)["state"] == "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_launcher_that_ends_before_training_leaves_nothing_running(tmp_path, recipe, number):
    output, printed = tmp_path / "run", tmp_path / "printed"
    output.mkdir()
    stale = {"state": "running", "step": 0, "reason": "", "time": ""}  # of a run that was killed
    (output / "status.json").write_text(json.dumps(stale))
    with launched("accelerate", recipe, f"output={output}", printed=printed) as process:
        wait_until((output / ".lock").exists, timeout=120)
        process.send_signal(number)
        wait_until(lambda: not running(f"output={output}"), timeout=30)
    assert status(output)["state"] == "preempted", printed.read_text()


def test_ctrl_c_is_answered_and_the_traceback_of_the_launcher_does_not_bury_it(tmp_path, recipe):
    output, printed = tmp_path / "run", tmp_path / "printed"
    with launched("accelerate", recipe, f"output={output}", printed=printed) as process:
        wait_until(lambda: has_rows(output, 3), timeout=120)
        os.killpg(process.pid, signal.SIGINT)
        wait_until(lambda: not running(f"output={output}"), timeout=30)
    assert status(output)["state"] == "preempted"
    text = printed.read_text()
    assert f"Ctrl-C: finishing step {status(output)['step']} and saving; Ctrl-C again to quit now\n" in text
    assert text.splitlines()[-1] == "Interrupted. The same command resumes from the newest checkpoint."
    assert f"Stopped by signal 2 after step {status(output)['step']}; run again to go on.\n" in text
