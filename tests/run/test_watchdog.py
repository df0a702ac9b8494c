"""A hang ends the process, what it started, and says so in its status; work is no hang."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_pipeline.run.processes import began, parent_of
from ssl_pipeline.run.watchdog import Watchdog
from tests.ranks import start


def hang(note: Path, *, fails: bool = False) -> None:
    """With a child that is stopped, and one of its own below it."""
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    child = subprocess.Popen([sys.executable, "-c", code + "print('up', flush=True); time.sleep(60)"], stdout=-1)
    child.stdout.readline()
    child.send_signal(signal.SIGSTOP)
    grandchild = next(int(f.name) for f in Path("/proc").glob("[0-9]*") if parent_of(int(f.name)) == child.pid)
    note.with_suffix(".pids").write_text(f"{child.pid} {grandchild}")

    def write(reason: str) -> None:
        note.write_text(reason)
        if fails:
            raise OSError("full")

    with Watchdog(0.5, note=write):
        time.sleep(30)


def hang_without_a_place_for_notes(note: Path) -> None:
    hang(note, fails=True)


@pytest.mark.parametrize("hangs", [hang, hang_without_a_place_for_notes])
def test_a_hang_is_noted_and_leaves_nothing_running(tmp_path, hangs):
    child = start(hangs, tmp_path / "note")
    assert child.wait() == 1
    assert "in hang" in child.printed(), "where it stood"
    assert (tmp_path / "note").read_text() == (
        "Nothing has happened for 0.5 s while training (train.hang_timeout); the output shows where each thread was."
    )
    pids = [int(pid) for pid in (tmp_path / "note.pids").read_text().split()]
    end = time.monotonic() + 5
    while any(began(pid) is not None for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)


def works(file: Path) -> None:
    """Longer than the time allowed: first by computing, then by writing."""
    with Watchdog(0.4, note=lambda reason: None, by_activity=True):
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            pass
        for _ in range(12):
            file.write_bytes(bytes(2_000_000))
            time.sleep(0.1)


def waits(file: Path) -> None:
    with Watchdog(0.4, note=lambda reason: None, by_activity=True):
        time.sleep(30)


def test_a_start_that_works_is_no_hang_and_one_that_waits_is(tmp_path):
    assert start(works, tmp_path / "file").wait() == 0
    waiting = start(waits, tmp_path / "file")
    assert waiting.wait() == 1
    assert "while starting" in waiting.printed()


def test_output_without_a_descriptor_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # a notebook's
    with Watchdog(60, note=print):
        pass
    monkeypatch.setattr(sys, "__stderr__", None)
    with Watchdog(60, note=print) as watchdog:
        watchdog.keepalive()


def test_a_process_that_has_ended_is_known_before_it_is_reaped():
    process = subprocess.Popen(["true"])
    assert parent_of(os.getpid()) == os.getppid()
    end = time.monotonic() + 5
    while began(process.pid) is not None:
        assert time.monotonic() < end
    process.wait()
