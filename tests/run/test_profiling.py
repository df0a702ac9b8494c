"""A trace holds the steps that were asked for, or the log says why there is none."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path

import torch

from ssl_pipeline.run.profiling import Profile

CPU = torch.device("cpu")


def profile(folder: Path, *, num_steps: int, made: int, first_step: int = 0) -> list[str]:
    """What is said by a run of `made` steps."""
    said: list[str] = []
    with (
        warnings.catch_warnings(),
        Profile(folder, num_steps=num_steps, first_step=first_step, device=CPU, report=said.append) as recorder,
    ):
        warnings.simplefilter("error", UserWarning)
        for number in range(made):
            if recorder.active:
                with torch.profiler.record_function(f"step {first_step + number + 1}"):
                    torch.ones(3).sum()
            recorder.step_done()
    return said


def steps_in(path: Path) -> list[int]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {str(event.get("name")) for event in events if event.get("cat") == "user_annotation"}
    return sorted(int(name.removeprefix("step ")) for name in names if name.startswith("step "))


def test_the_steps_after_the_warm_up_are_recorded(tmp_path):
    (said,) = profile(tmp_path / "profile", num_steps=2, made=12, first_step=30)
    path = tmp_path / "profile" / "steps-36-to-37.json.gz"
    assert steps_in(path) == [36, 37]
    assert said == f"Trace of steps 36 to 37: {path} (open it in https://ui.perfetto.dev)"


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path):
    (said,) = profile(tmp_path, num_steps=5, made=7)
    assert steps_in(tmp_path / "steps-6-to-7.json.gz") == [6, 7]
    assert said.startswith("Trace of steps 6 to 7: ")


def test_a_run_that_ends_before_says_so(tmp_path):
    assert profile(tmp_path, num_steps=5, made=3) == [
        "train.profile: the run ended before step 6; nothing was recorded."
    ]
    assert list(tmp_path.iterdir()) == []


def test_switched_off_nothing_is_written(tmp_path):
    assert profile(tmp_path, num_steps=0, made=8) == []
    assert list(tmp_path.iterdir()) == []
