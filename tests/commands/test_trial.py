"""The trial before a run whose recipe is chosen: the expected time, and what a trial must not do."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
import yaml

from ssl_pipeline.commands import images, process, trial
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.commands.trial import duration, expected_time
from ssl_pipeline.config import ConfigError
from tests.runs import write_recipe
from tests.tiny import write_shards

ROOT = Path(__file__).parents[2]
EXPECTED = re.compile(r"Expected time: (\S+) (s|min|h) \((\S+) images/s\)")
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@pytest.fixture
def recipe(tmp_path, shards) -> Path:
    long = {"epochs": 40, "precision": "no", "hang_timeout": 0}
    return write_recipe(
        tmp_path / "tiny.yaml", "simclr", shards, train=long, knn={"every": "1ep", "train": "a", "val": "b"}
    )


def arguments(recipe: Path, place: Path) -> list[str]:
    return [f"recipe={recipe}", "images=photos/", f"output={place / 'run'}", "knn.k=5", "data.batch_size=4"]


def test_the_whole_run_is_told_from_some_steps_of_it(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(trial, "SECONDS", 300.0)  # of a machine that is busy with other tests
    before = set(tmp_path.iterdir())
    told = expected_time(PretrainConfig, arguments(recipe, tmp_path), {"seed": 3}, num_images=48)
    number, unit, per_second = EXPECTED.fullmatch(told).groups()
    assert float(number) * SECONDS[unit] == pytest.approx(40 * 48 / float(per_second), rel=0.1)
    assert set(tmp_path.iterdir()) == before  # nothing of it stays, and nothing is written into the run


def test_overrides_and_arguments_are_those_of_the_run(tmp_path, recipe, monkeypatch):
    seen = {}

    def run(argv: list[str]) -> str:
        seen["argv"], seen["recipe"] = argv, yaml.safe_load(Path(argv[0].removeprefix("recipe=")).read_text())
        output = Path(argv[1].removeprefix("output="))
        output.mkdir()
        rows = [(step, 4 * step, 1.0 if step == 1 else 8.0) for step in (1, 2, 3)]
        lines = [f'{{"step": {s}, "images": {p}, "images_per_second": {i}}}\n' for s, p, i in rows]
        (output / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "imag')
        return ""

    monkeypatch.setattr(trial, "_run", run)
    overrides = {"train": {"steps": 100}, "backbone.name": "resnet18"}
    assert (
        expected_time(PretrainConfig, arguments(recipe, tmp_path), overrides, num_images=48)
        == "Expected time: 50 s (8 images/s)"
    )
    assert len(seen["argv"]) == 2
    assert seen["recipe"]["data"]["batch_size"] == 4
    assert (seen["recipe"]["backbone"]["name"], seen["recipe"]["knn"]) == ("resnet18", None)
    assert seen["recipe"]["backbone"]["arguments"] == {}  # those of the recipe were another network's
    assert (seen["recipe"]["train"]["epochs"], seen["recipe"]["train"]["steps"]) == (None, trial.STEPS)


def test_a_mistake_is_told_before_anything_is_tried(tmp_path, recipe, monkeypatch, capsys):
    monkeypatch.setattr(trial, "_run", None)
    with pytest.raises(ConfigError, match="Did you mean"):
        expected_time(PretrainConfig, [*arguments(recipe, tmp_path), "train.stepz=3"], {}, num_images=48)
    assert capsys.readouterr().err == ""


def test_the_time_is_up_at_some_moment_and_the_process_ends(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 0.3)
    started, processes = time.monotonic(), []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: processes.append(popen(*a, **k)) or processes[0])
    told = expected_time(PretrainConfig, arguments(recipe, tmp_path), {}, num_images=48)
    assert told == "No step was timed in 0 s, so there is no time estimate"
    assert time.monotonic() - started < 5
    assert processes[0].poll() is not None


def test_a_trial_that_fails_says_why(tmp_path, recipe, monkeypatch):
    def failing(argv: list[str], *, output: IO[bytes]) -> subprocess.Popen[bytes]:
        code = "import sys; print('some steps'); print('error: The loss is NaN.', file=sys.stderr); sys.exit(1)"
        return subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)

    monkeypatch.setattr(trial, "start_pretraining", failing)
    told = expected_time(PretrainConfig, arguments(recipe, tmp_path), {}, num_images=48)
    assert told == "No time estimate: a trial of 20 steps failed (The loss is NaN)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.26, "4.3 s"), (89, "89 s"), (150, "2.5 min"), (5340, "89 min"), (36_000, "10 h"), (864_000, "10 days"),
     (17_280_000, "200 days")],
)  # fmt: skip
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("more", "overrides", "environment", "asked"),
    [
        ([], {}, {}, True),
        (["train.steps=null"], {}, {}, True),
        (["train.steps=5"], {}, {}, False),
        ([], {"train.steps": 5}, {}, False),
        ([], {}, {"WORLD_SIZE": "2", "RANK": "0"}, True),
        ([], {}, {"WORLD_SIZE": "2", "RANK": "1"}, False),
        (["recipe=photos_small", "data.batch_size=8"], {}, {}, False),
    ],
)
def test_a_trial_is_made_by_the_first_process_where_a_choice_is_made(
    tmp_path, shards, monkeypatch, capsys, more, overrides, environment, asked
):
    monkeypatch.setattr(images, "expected_time", lambda *_, **__: "Expected time: 3 h")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = [f"images={shards}", f"output={tmp_path / 'run'}", *more]
    images.expand(given, overrides, timed=PretrainConfig)
    assert ("Expected time: 3 h. recipe=NAME chooses another." in capsys.readouterr().out) == asked


def test_processes_share_the_work_of_the_run(recipe, tmp_path, monkeypatch):
    started = []
    rows = [{"step": step, "images": 4 * step, "images_per_second": 8.0} for step in (1, 2, 3)]
    monkeypatch.setattr(trial, "_rows", lambda path: rows)
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: started.append(env) or Ended())
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "2")
    told = expected_time(PretrainConfig, arguments(recipe, tmp_path), {}, num_images=48, num_processes=2)
    assert told == "Expected time: 2 min (8 images/s in each of 2 processes, if none waits for another)"
    (environment,) = started
    assert not [name for name in environment if name.startswith(process.OF_LAUNCHERS)]
    assert "PATH" in environment


class Ended:
    """A process that has ended."""

    def poll(self) -> int:
        return 0

    kill = wait = poll


@pytest.mark.parametrize(("flags", "asked"), [(["--print"], False), (["--help"], False), ([], True)])
def test_the_command_makes_one_only_if_it_trains(tmp_path, shards, flags, asked):
    code = (
        "import sys; from ssl_pipeline.commands import images, pretrain\n"
        "images.expected_time = lambda *_, **__: print('TRIAL') or ''\n"
        "pretrain.pretrain = lambda config: 0\n"
        "sys.exit(pretrain.main('pretrain.py'))"
    )
    argv = [f"images={shards}", f"output={tmp_path / 'run'}", *flags]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("TRIAL" in done.stdout) == asked
