"""Monitors: what is due is saved before they measure, their failures cost nothing, falls below the start are said."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import ConfigError, RunError
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.distributed import failing_together, rank
from ssl_pipeline.eval.features.extract import extract_features
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.schedule import Duration, Progress
from ssl_pipeline.training import monitors
from ssl_pipeline.training.loop import train
from ssl_pipeline.training.monitor_cost import MonitorCost
from ssl_pipeline.training.monitors import Watched
from tests.ranks import run_on_ranks, start
from tests.runs import command, make_run, rows, write_recipe
from tests.tiny import write_shards


class Scripted:
    """A monitor that gives prepared figures, or raises those that are errors."""

    def __init__(self, every: int, figures: Sequence[float | BaseException]) -> None:
        self.every, self.figures = Duration(every), iter(figures)
        self.steps: list[int] = []

    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        self.steps.append(progress.step)
        figure = next(self.figures)
        if isinstance(figure, BaseException):
            raise figure
        return {"figure": figure}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@pytest.fixture
def run(tmp_path, shards) -> Callable[..., list[dict[str, float]]]:
    """Starts a run in the same directory again; its rows."""

    def start_run(monitor: Scripted, *, steps: int = 4, save_every: int = 2, **watched) -> list[dict[str, float]]:
        output = tmp_path / "run"
        output.mkdir(exist_ok=True)
        with RunDirectory(output) as directory:
            options = {"directory": directory, "monitors": [Watched(monitor, "mine", **watched)]}
            options |= {"steps": steps, "save_every": save_every}
            assert train(make_run(output, "simclr", shards, **options)) == 0
        return rows(output)

    return start_run


def saved(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))


def without_times(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")} for row in found]


def test_what_was_due_is_saved_before_a_monitor_fails(tmp_path, run):
    with pytest.raises(ConfigError, match="no image"):
        run(Scripted(2, [ConfigError("no image")]))
    assert saved(tmp_path / "run") == [2]
    again = Scripted(2, [7.0, 8.0])
    found = run(again)
    assert again.steps == [2, 4], "what could not be measured is measured when the run goes on"
    assert [(row["step"], row.get("figure")) for row in found] == [(1, None), (2, 7.0), (3, None), (4, 8.0)]


@pytest.mark.parametrize("at", [2, 4])
def test_a_run_that_ends_while_it_measures_loses_no_row(tmp_path, run, at):
    whole = without_times(run(Scripted(2, [1.0, 2.0])))
    (tmp_path / "run").rename(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(2, [KeyboardInterrupt()] if at == 2 else [1.0, KeyboardInterrupt()]))
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, at))
    again = Scripted(2, [1.0, 2.0] if at == 2 else [2.0])
    assert without_times(run(again)) == whole
    assert again.steps == [2, 4][at // 2 - 1 :]


def test_a_failure_that_is_skipped_is_said_and_stands_in_its_row(run, capsys):
    found = run(Scripted(2, [ConfigError("the disk is gone"), 5.0]), on_error="skip")
    assert capsys.readouterr().err.count("mine is skipped at step 2 (on_error=skip): the disk is gone\n") == 1
    assert [(row.get("figure"), row.get("mine_error")) for row in found] == [
        (None, None),
        (None, "the disk is gone"),
        (None, None),
        (5.0, None),
    ]


COMPARED = {"figure": "The figure"}
FELL = "The figure fell from 60.0 % at the start to "


def test_the_start_is_the_first_row_and_survives_a_resume(tmp_path, run, capsys):
    found = run(Scripted(2, [60.0, 61.0]), steps=2, at_start=True, compared=COMPARED)
    assert found[0] == {"step": 0, "epoch": 0.0, "images": 0, "figure": 60.0}
    assert [row["step"] for row in found] == [0, 1, 2]
    assert FELL not in capsys.readouterr().err
    state = Checkpoints(tmp_path / "run" / "checkpoints").load_latest().state
    assert state.start == {"figure": 60.0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(found[2]) + "\n")  # not the log, the checkpoint keeps it
    later = Scripted(2, [58.9])
    run(later, steps=4, at_start=True, compared=COMPARED)
    assert later.steps[-1] == 4
    said = f"{FELL}58.9 % at step 4. Try a lower optim.lr, a backbone that stays frozen for longer, or"
    assert said in capsys.readouterr().err


def test_a_fall_is_said_at_each_measurement_that_changes_it(run, capsys):
    run(Scripted(1, [60.0, 59.1, 59.0, 59.0, 57.0, 59.5]), steps=5, at_start=True, compared=COMPARED)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("The figure")]
    assert [line.split(". Try")[0] for line in lines] == [
        f"{FELL}59.0 % at step 2",
        f"{FELL}57.0 % at step 4",
        "The figure is 59.5 % at step 5, no longer below the start (60.0 %).",
    ]


def test_a_start_that_is_begun_anew_has_one_row_of_it(tmp_path, run):
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(1, [60.0, KeyboardInterrupt()]), at_start=True, save_every=4)
    assert len(rows(tmp_path / "run")) == 1
    found = run(Scripted(1, [60.0, 1.0, 2.0, 3.0, 4.0]), at_start=True)
    assert [(row["step"], row["figure"]) for row in found] == [(0, 60.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def raised_on_a_rank() -> str:
    try:
        with failing_together("cpu"):
            if rank() == 1:
                raise ConfigError("image 7 is damagéd")
    except (ConfigError, RunError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_one_rank_meets_all_raise():
    assert run_on_ranks(raised_on_a_rank, world_size=3) == [
        "RunError: On rank 1: image 7 is damagéd",
        "ConfigError: image 7 is damagéd",
        "RunError: On rank 1: image 7 is damagéd",
    ]


def extracted_on_a_rank(val: Path) -> str:
    preprocessing = Preprocessing(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    try:
        extract_features(nn.Flatten(), open_shards(val), preprocessing, batch_size=2, workers=0)
    except (ConfigError, RunError) as error:
        return str(error)
    return "nothing"


def test_an_image_that_one_rank_cannot_decode_holds_up_nobody(tmp_path):
    val = write_shards(tmp_path / "val", (6,), corrupt=(4,))
    open_shards(val)
    first, second = run_on_ranks(extracted_on_a_rank, val)
    assert first == f"On rank 1: {second}"
    assert second.startswith("Cannot decode part-000000.tar, key '0004'")


def test_without_other_processes_an_error_is_itself():
    with pytest.raises(ConfigError, match="alone"), failing_together("cpu"):
        raise ConfigError("alone")


# The command


@pytest.fixture
def pretrain(tmp_path, shards) -> Callable[..., tuple[int, str, list[dict]]]:
    """Exit code, output and rows of a run with more settings."""

    def run_command(*argv: str) -> tuple[int, str, list[dict]]:
        recipe = write_recipe(tmp_path / "recipe.yaml", "simclr", shards)
        output = tmp_path / "run"
        child = start(command, [f"recipe={recipe}", f"output={output}", "train.steps=4", *argv])
        return child.wait(), child.printed(), rows(output)

    return run_command


def knn(train: Path, val: Path) -> list[str]:
    return [f"knn={{every: 2, train: {train}, val: {val}, k: 3}}"]


def test_a_validation_image_that_is_broken_costs_no_checkpoint(tmp_path, shards, pretrain):
    val = write_shards(tmp_path / "val", (6,), cut=(4,))
    code, printed, found = pretrain(*knn(shards, val))
    assert code == 0, printed
    assert "knn is skipped at step 2 (on_error=skip): Cannot decode part-000000.tar, key '0004'" in printed
    assert "Cannot decode" in found[1]["knn_error"]
    assert (tmp_path / "run" / "backbone.safetensors").exists()


def test_a_failing_monitor_may_stop_the_run_which_is_saved(tmp_path, shards, pretrain):
    val = write_shards(tmp_path / "val", (6,), cut=(4,))
    code, printed, found = pretrain(*knn(shards, val), "knn.on_error=stop", "train.save_every=2")
    assert code == 2
    assert "error: Cannot decode part-000000.tar, key '0004'" in printed
    assert saved(tmp_path / "run") == [2]
    assert [row["step"] for row in found] == [1]


def test_validation_images_are_looked_at_before_training(tmp_path, shards, pretrain):
    val = write_shards(tmp_path / "val", (6,), cut=(0,))
    code, printed, found = pretrain(*knn(shards, val))
    assert (code, found) == (2, [])
    assert "error: Cannot decode part-000000.tar, key '0000'" in printed


def test_validation_images_that_are_none_are_left_out_and_named_at_the_start(tmp_path, shards, pretrain):
    val = write_shards(tmp_path / "val", (6,), corrupt=(0, 4))
    code, printed, found = pretrain(*knn(shards, val))
    assert code == 0, printed
    what = f"2 of 6 images of {val} cannot be decoded; the first: part-000000.tar, key '0000'"
    assert f"warning: knn leaves out what it cannot measure: {what}" in printed
    assert printed.count("leaves out") == 1
    assert "knn_error" not in found[1]
    assert found[1]["knn_top1"] % 25 == 0, "of four images"
    (tmp_path / "run").rename(tmp_path / "first")
    code, printed, found = pretrain(*knn(shards, val), "knn.on_error=stop")
    assert code == 2
    assert f"error: knn: {what}" in printed


def test_a_run_from_weights_begins_its_log_with_the_start(tmp_path, shards, pretrain):
    assert pretrain()[0] == 0
    weights = (tmp_path / "run").rename(tmp_path / "first") / "backbone.safetensors"
    spectrum = "spectrum={every: 2, images: 30}"
    code, printed, found = pretrain(*knn(shards, shards), spectrum, f"backbone.weights={weights}")
    assert code == 0, printed
    assert "48 of 48 images" in printed, "the validation images are training images here"
    assert {"step", "epoch", "images", "knn_top1", "knn_top5", "rankme", "rankme_percent", "alpha"} == set(found[0])
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    assert 1 <= found[2]["rankme"] <= 24
    assert found[2]["rankme_percent"] == pytest.approx(100 * found[2]["rankme"] / 24)


def test_a_run_in_bf16_is_measured_in_bf16(tmp_path, pretrain):
    measured = {}
    for precision in ("no", "bf16"):
        _, _, found = pretrain("spectrum={every: 4, images: 30, at_start: true}", f"train.precision={precision}")
        measured[precision] = found[0]["rankme"]  # of the same weights
        (tmp_path / "run").rename(tmp_path / precision)
    assert measured["bf16"] != measured["no"]
    assert measured["bf16"] == pytest.approx(measured["no"], rel=0.05)


def test_at_start_can_be_asked_for_and_left_out(tmp_path, pretrain):
    assert pretrain("spectrum={every: 4, images: 30, at_start: true}")[2][0]["step"] == 0
    torch.manual_seed(0)
    weights = (tmp_path / "run").rename(tmp_path / "first") / "backbone.safetensors"
    assert pretrain("spectrum={every: 4, at_start: false}", f"backbone.weights={weights}")[2][0]["step"] == 1


def test_a_spectrum_of_a_few_images_is_refused_at_the_start(pretrain):
    code, printed, _ = pretrain("spectrum={every: 2, images: 4}")
    assert code == 2
    assert "spectrum needs 6 images and 5 dimensions or more. Got 4 images" in printed


@pytest.mark.parametrize(
    ("measured", "trained", "total", "said"),
    [
        (4.0, 1.0, 1000, "knn.every=40 leaves 5 times as long between two"),  # of two steps of half a second
        (4.0, 1.0, 40, "knn.every=0 measures only at the end"),
        (4.0, 5.0, 1000, None),
        (1.0, 0.5, 1000, None),  # seconds in all
    ],
)
def test_monitors_that_take_longer_than_the_training_between_are_said_once(measured, trained, total, said):
    cost, now, told = MonitorCost(total), 100.0, []
    for step in (2, 4, 6, 8):
        told.append(cost.observe(["knn"], step=step, began=now, ended=now + measured))
        now += measured + trained
    assert told[:2] == [None, None]
    assert told[3] is None
    if said is None:
        assert told[2] is None
    else:
        start = f"Measuring knn takes {measured:.1f} s each time, the training in between {trained:.1f} s. "
        assert told[2] == f"{start}{said}; the same command goes on with it."


class Slow(Scripted):
    """Takes three seconds of the clock for each figure."""

    def __init__(self, every: int, figures: Sequence[float], clock: list[float]) -> None:
        super().__init__(every, figures)
        self.clock = clock

    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        self.clock[0] += 3.0
        return super().__call__(backbone, progress)


def test_a_short_run_says_which_key_measures_less_often(run, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(monitors, "perf_counter", lambda: clock[0])
    found = run(Slow(1, [1.0] * 6, clock), steps=6, save_every=6)
    assert [row["figure"] for row in found] == [1.0] * 6
    assert capsys.readouterr().err.count("Measuring mine takes 3.0 s each time") == 1
