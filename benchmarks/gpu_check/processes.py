"""Commands of this checkout, each in a process of its own that ends with its time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.settings import Place, StepFigures

ROOT = Path(__file__).parents[2]
SECONDS_BETWEEN_LOOKS = 0.2

Row = dict[str, float]


class CheckError(Exception):
    """A check found that something does not work; the words are for the table."""


class TookTooLongError(Exception):
    """The time of a check is over."""


def run_python(place: Place, *arguments: str, kill_at_step: tuple[Path, int] | None = None) -> str:
    """What a command of this interpreter prints, in the checkout; its whole process group ends with the place's time.

    kill_at_step: a run and a step at which it is killed as by a power cut; it must not end before. Raises CheckError
    with the last line if the command fails.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    log = place.folder / f"{len(list(place.folder.glob('*.log'))):02d}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                if not place.seconds_left:
                    raise TookTooLongError
                if kill_at_step is not None and last_step(kill_at_step[0]) >= kill_at_step[1]:
                    break
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            killed = process.poll() is None
            if killed:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode and not killed:
        last = (printed.strip().splitlines() or ["no output"])[-1]
        raise CheckError(f"{last[:160]} ({log})")
    return printed


def pretrain(place: Place, name: str, *settings: str, **limits: tuple[Path, int]) -> list[Row]:
    """The rows of a run of pretrain.py with these settings in FOLDER/NAME; it goes on if it is there."""
    run = place.folder / name
    run_python(place, "pretrain.py", f"output={run}", *settings, **limits)
    return rows_of(run)


def rows_of(run: Path) -> list[Row]:
    """The rows of a run's metrics so far."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line is being written
            break
    return rows


def last_step(run: Path) -> int:
    """The step of the newest row; 0 without one."""
    rows = rows_of(run)
    return int(rows[-1]["step"]) if rows else 0


def report(place: Place, *arguments: str) -> StepFigures:
    """What `python -m benchmarks.gpu_check.step_report` prints last."""
    printed = run_python(place, "-m", "benchmarks.gpu_check.step_report", *arguments)
    return StepFigures(**json.loads(printed.strip().splitlines()[-1]))


def tests(place: Place, paths: Sequence[str], *selection: str) -> tuple[int, int, int]:
    """How many of some tests passed, failed and were skipped."""
    log = place.folder / "tests.xml"
    place.folder.mkdir(parents=True, exist_ok=True)
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={log}", *selection, *paths]
    failure: CheckError | None = None
    try:
        run_python(place, *arguments)
    except CheckError as error:
        failure = error
    counts = _counts(log)
    if counts is None or (failure is not None and not counts[1]):
        raise failure or CheckError("pytest left no report")
    return counts


def _counts(log: Path) -> tuple[int, int, int] | None:
    from xml.etree import ElementTree  # of a file that pytest has just written

    if not log.exists():
        return None
    suites = ElementTree.parse(log).getroot().iter("testsuite")
    total = failed = skipped = 0
    for suite in suites:
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return total - failed - skipped, failed, skipped
