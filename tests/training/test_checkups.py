"""The doctor during a run: each finding is said once, is kept in doctor.json, and is told by eval.doctor."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from ssl_pipeline.eval import doctor
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.training import checkups
from ssl_pipeline.training.checkups import thinned
from ssl_pipeline.training.loop import train
from tests.runs import SGD, make_run, rows, write_recipe
from tests.runs import _pretrain as pretrain
from tests.tiny import write_shards

NO_RATE = SGD | {"lr": {"value": 0.0}}
SAID = "the learning rate is 0: nothing is learnt."


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@pytest.fixture
def run(tmp_path, shards) -> Callable[..., Path]:
    """Trains in the same directory again, which it returns."""

    def start_run(*, steps: int = 6, optim=NO_RATE) -> Path:
        output = tmp_path / "run"
        output.mkdir(exist_ok=True)
        with RunDirectory(output) as directory:
            options = {"directory": directory, "optim": optim, "steps": steps, "save_every": 6}
            assert train(make_run(output, "simclr", shards, **options)) == 0
        return output

    return start_run


def kept(output: Path, *, besides: tuple[str, ...] = ("waits_for_data",)) -> list[dict]:
    """What doctor.json has, without what depends on how busy the machine is."""
    findings = json.loads((output / "doctor.json").read_text())["findings"]
    return [finding for finding in findings if finding["rule"] not in besides]


def test_a_finding_is_said_once_and_kept(run, capsys):
    output = run()
    assert capsys.readouterr().err.count(SAID) == 1
    [finding] = kept(output)
    assert finding["rule"] == "rate_is_zero"
    assert finding["settings"] == ["optim.lr"]
    assert finding["step"] == 1
    assert len(rows(output)) == 6


def test_a_resumed_run_does_not_say_it_again(run, capsys):
    run()
    capsys.readouterr()
    output = run(steps=12)
    assert SAID not in capsys.readouterr().err
    assert [finding["rule"] for finding in kept(output)] == ["rate_is_zero"]


def test_a_run_begun_anew_forgets_what_was_found(run, tmp_path):
    output = run()
    for path in sorted((output / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert kept(run(optim=SGD)) == []
    assert output == tmp_path / "run"


def test_a_doctor_that_fails_costs_a_line(run, capsys):
    with mock.patch.object(checkups, "diagnose", side_effect=ZeroDivisionError("half a batch")):
        output = run()
    said = capsys.readouterr().err
    assert said.count("The doctor is skipped from step 1 on: ") == 1
    assert "half a batch" in said
    assert len(rows(output)) == 6


def test_what_monitors_and_loader_say_themselves_is_kept_and_not_said(run, capsys):
    finding = checkups.Finding(
        "waits_for_data", 2, "half of the time was spent waiting.", "Try more.", ("data.workers",)
    )
    with mock.patch.object(checkups, "diagnose", return_value=[finding]):
        output = run()
    assert "half of the time" not in capsys.readouterr().err
    assert [finding["rule"] for finding in kept(output, besides=())] == ["waits_for_data"]


def test_many_rows_are_thinned_and_those_of_monitors_stay():
    many = [{"step": step} | ({"knn_top1": 1.0} if step % 100 == 0 else {}) for step in range(10_001)]
    fewer = thinned(many)
    assert len(fewer) <= checkups.MOST_ROWS
    assert fewer[-1000:] == many[-1000:]
    assert sum("knn_top1" in row for row in fewer) == 101
    with_monitors = [row | {"rankme": 1.0} for row in many]
    assert thinned(with_monitors) == with_monitors


# The command


def test_eval_doctor_tells_what_the_log_said(run, capsys):
    output = run()
    capsys.readouterr()
    config = "method: {name: simclr}\noptim: {name: sgd, lr: {value: 0.0}}\ntrain: {steps: 6}\n"
    (output / "config.yaml").write_text(config)
    doctor.main(doctor.DoctorConfig(run=output))
    told = capsys.readouterr().out
    assert told.startswith(f"Step 1: {SAID}\n    Set optim.lr.value")
    assert "settings: optim.lr" in told


def test_eval_doctor_of_a_whole_run_by_the_command(tmp_path, shards, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", "simclr", shards, optim=NO_RATE)
    assert pretrain([f"recipe={recipe}", f"output={tmp_path / 'run'}", "train.steps=6"]) == 0
    assert SAID in capsys.readouterr().err
    with mock.patch("sys.argv", ["eval.doctor", str(tmp_path / "run")]):
        assert doctor.command() == 0
    assert SAID in capsys.readouterr().out


def test_eval_doctor_says_what_it_lacks(tmp_path, capsys):
    with mock.patch("sys.argv", ["eval.doctor", f"run={tmp_path}"]):
        assert doctor.command() == 2
        assert "is not the directory of a run: it has no config.yaml" in capsys.readouterr().err
        (tmp_path / "config.yaml").write_text("train: {steps: 6}\n")
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epo')
        assert doctor.command() == 2
        assert "has no row in metrics.jsonl yet" in capsys.readouterr().err
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "images": 8, "loss": 1.0}\n')
        assert doctor.command() == 0
        assert "nothing found" in capsys.readouterr().out
