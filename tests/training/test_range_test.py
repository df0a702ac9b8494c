"""The learning-rate range test: when it ends, what it suggests, and that it leaves no run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ssl_pipeline.eval.page.range_plot import range_plot
from ssl_pipeline.optim.optimizer import OptimConfig
from ssl_pipeline.schedule import Schedule
from ssl_pipeline.training.range_test import RANGES, RangeTest, is_over, less_drift, rates_of, smooth
from tests.ranks import start, start_ranks
from tests.runs import ADAMW, command, write_recipe
from tests.tiny import write_shards


def test_rates_grow_by_a_factor_over_the_range_of_the_optimizer():
    rates = rates_of(OptimConfig(name="adamw", lr=Schedule(value=1e-3)), 8)
    assert rates == pytest.approx([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert rates_of(OptimConfig(name="sgd", lr=Schedule(value=0.1)), 2) == pytest.approx(RANGES["sgd"])


def test_the_average_has_no_pull_to_its_start():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, (0.9 * 1 + 2) / 1.9])


def test_what_the_loss_does_without_learning_is_left_out():
    assert less_drift([5.0, 5.5, 5.6, 4.0], [5.0, 5.5, 6.0, 6.5]) == pytest.approx([5.0, 5.0, 4.6, 2.5])
    assert less_drift([5.0], [5.0, 5.5]) == [5.0]  # a test that ended early


@pytest.mark.parametrize(
    ("losses", "over"),
    [
        ([4.0, 3.0, 2.0], False),
        ([4.0, 2.0, 2.9], False),
        ([4.0, 2.0, 3.5], True),
        ([4.0, 4.2], False),
        ([4.0, 5.0], True),
    ],
)
def test_it_ends_when_the_loss_has_risen_again(losses, over):
    assert is_over(losses) is over


def found(losses: list[float], per_setting: float = 1.0) -> RangeTest:
    rates = [10.0 ** (-6 + 0.25 * number) for number in range(len(losses))]
    return RangeTest(rates, losses, losses, losses, per_setting, "")


def test_the_rate_of_the_fastest_fall_is_suggested_in_the_units_of_the_setting():
    losses = [9.0] * 6 + [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0] + [1.9, 1.8, 1.7, 1.6, 5.0]  # steps 5 to 12 fall by 7
    assert found(losses).steepest == 7  # by 6 from step 4 on: nearly as fast, at a lower rate
    assert found(losses).suggestion == pytest.approx(10**-4.25)
    assert found(losses, per_setting=0.5).suggestion == pytest.approx(2 * 10**-4.25)


def test_a_fall_after_the_lowest_loss_does_not_count():
    losses = [9.0] * 4 + [8.5, 8.0, 7.5, 7.0, 6.5, 6.0, 1.0, 90.0, 80.0, 60.0, 50.0, 40.0, 30.0, 20.0, 10.0]
    assert found(losses).steepest == 6


def test_where_the_loss_falls_alike_over_many_rates_chance_does_not_choose():
    slope = [5.0 - 0.1 * step + (0.01 if step % 2 else 0.0) for step in range(40)]
    noisier = [loss - (0.05 if step == 30 else 0.0) for step, loss in enumerate(slope)]
    assert found(slope).steepest == found(noisier).steepest == 3


@pytest.mark.parametrize("losses", [[1.0 + 0.1 * step for step in range(20)], [3.0, 2.0, 1.0], []])
def test_nothing_is_suggested_where_the_loss_never_fell_or_hardly_began(losses):
    assert found(losses).suggestion is None


def test_the_plot_stands_alone():
    test = found([4.0] * 8 + [3.0, 2.0, 1.0, 2.0, 900.0])
    svg = range_plot(test.rates, test.losses, test.smoothed, [("mark", "suggested", 1e-4)])
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    ys = [float(y) for y in re.findall(r"[ \"][\d.]+,(-?[\d.]+)", svg)]
    assert ys
    assert all(0 <= y <= 360 for y in ys)


# The command


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, shards) -> str:
    train = {"steps": 40, "save_every": 4, "log_every": 1, "hang_timeout": 0}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    optim = ADAMW | {"freeze_backbone_for": 1000, "lr_reference_batch": 4}
    return f"recipe={write_recipe(path, 'simclr', shards, train=train, optim=optim)}"


@pytest.mark.ddp
def test_it_leaves_two_files_and_no_run(recipe, tmp_path):
    child = start(command, [recipe, f"output={tmp_path / 'run'}", "find_lr=true", "train.sync_batch_norm=true"])
    assert child.wait() == 0, child.printed()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"find_lr.json", "find_lr.svg"}
    told = json.loads((tmp_path / "run" / "find_lr.json").read_text())
    assert told["effective_lr_per_optim_lr"] == 2.0  # 8 images, reference 4
    assert len(told["effective_lr"]) == len(told["loss"]) <= 40
    assert told["effective_lr"][0] == pytest.approx(1e-7)
    assert told["loss_without_learning"][0] == told["loss"][0]  # the same images, draws and weights
    assert told["loss_without_learning"][5] == pytest.approx(told["loss"][5], rel=1e-3)  # at a rate that does nothing
    assert "suggested" in child.printed()
    # a run may follow in the same directory
    assert start(command, [recipe, f"output={tmp_path / 'run'}", "train.steps=2"]).wait() == 0


@pytest.mark.ddp
def test_a_run_that_is_there_stays_as_it_is(recipe, tmp_path):
    argv = [recipe, f"output={tmp_path / 'run'}"]
    assert start(command, [*argv, "train.steps=2"]).wait() == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert start(command, [*argv, "find_lr=true", "optim.momentum=0.5"]).wait() == 0
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"find_lr.json", "find_lr.svg"}
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.ddp
def test_two_processes_find_what_one_finds(recipe, tmp_path):
    argv = [recipe, "find_lr=true", "train.sync_batch_norm=true"]
    assert start(command, [*argv, f"output={tmp_path / 'one'}"]).wait() == 0
    together = [*argv, f"output={tmp_path / 'two'}", "data.batch_size=4"]
    assert [child.wait() for child in start_ranks(command, together)] == [0, 0]
    one, two = (json.loads((tmp_path / name / "find_lr.json").read_text()) for name in ("one", "two"))
    assert two["effective_lr"][:10] == one["effective_lr"][:10]
    torch.testing.assert_close(two["loss"][:10], one["loss"][:10], rtol=1e-3, atol=1e-4)
