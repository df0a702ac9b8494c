"""train.on_nan=skip: a broken step leaves everything as it was, on all ranks, and the same after a resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from ssl_pipeline.config import RunError
from ssl_pipeline.optim.optimizer import build_optimizer
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.run.optimizer_state import optimizer_tensors
from ssl_pipeline.schedule import Duration, Progress
from ssl_pipeline.training import step
from ssl_pipeline.training.loop import train
from ssl_pipeline.training.statistics import NormStatistics
from ssl_pipeline.training.step_checks import StepChecks
from tests.ranks import start_ranks
from tests.runs import equal, final_state, make_run, rows
from tests.tiny import CNN, write_shards

IMAGE = 17  # whose views are not finite; it comes once in each of the two epochs


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@contextmanager
def poisoned(image: int = IMAGE) -> Iterator[list[int]]:
    """Views of this image are NaN; the list gets the number of each micro-batch (from 0) that has it."""
    original: Callable = step.make_batch
    found, made = list[int](), [0]

    def make_batch(*arguments: object, **named: object) -> object:
        batch = original(*arguments, **named)
        if image in batch.sample_ids:
            found.append(made[0])
            for views in batch.views.values():
                views[:, batch.sample_ids == image] = torch.nan
        made[0] += 1
        return batch

    with mock.patch.object(step, "make_batch", make_batch):
        yield found


@contextmanager
def recorded() -> Iterator[list[dict[str, Tensor]]]:
    """All tensors of method and optimizer after each step."""
    states = list[dict[str, Tensor]]()
    original = step.TrainingStep.__call__

    def call(self: step.TrainingStep, *arguments: object) -> object:
        result = original(self, *arguments)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        tensors = {**self.run.method.state_dict(), **optimizer_tensors(inner)}
        states.append({name: tensor.clone() for name, tensor in tensors.items()})
        return result

    with mock.patch.object(step.TrainingStep, "__call__", call):
        yield states


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("dino", CNN), ("moco", CNN), ("simclr", CNN), ("swav", CNN), ("flexmatch", CNN), ("dinov2", None)],
)
def test_a_step_that_is_left_out_changes_nothing_but_the_position(tmp_path, shards, name, backbone):
    network = {} if backbone is None else {"backbone": backbone}
    with RunDirectory(tmp_path) as directory, poisoned() as steps, recorded() as states:
        settings = {"on_nan": "skip", "directory": directory, "steps": 7, **network}
        assert train(make_run(tmp_path, name, shards, **settings)) == 0
    (left_out,) = steps
    assert 0 < left_out < 6
    assert equal(states[left_out], states[left_out - 1])
    assert not equal(states[left_out + 1], states[left_out]), "the run goes on"
    assert all(torch.isfinite(tensor).all() for tensor in states[-1].values() if tensor.is_floating_point())
    logged = rows(tmp_path)
    assert [row["left_out_steps"] for row in logged] == [int(row["step"] > left_out) for row in logged]
    assert [row["loss"] is None for row in logged] == [row["step"] == left_out + 1 for row in logged]


class StopAfter:
    """A monitor that sends the signal of a preemption after a step."""

    every = Duration(1)

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        if progress.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}


@pytest.mark.other
def test_a_resumed_run_leaves_out_the_same_steps_and_counts_on(tmp_path, shards):
    settings = {"on_nan": "skip", "nan_budget": 2, "save_every": 100, "backbone": CNN}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    with RunDirectory(whole) as directory, poisoned() as steps:
        assert train(make_run(whole, "moco", shards, directory=directory, **settings)) == 0
    assert len(steps) == 2
    for monitors in ([StopAfter(steps[0] + 2)], []):
        with RunDirectory(parts) as directory, poisoned():
            code = train(make_run(parts, "moco", shards, directory=directory, monitors=monitors, **settings))
            assert code == (signal.SIGTERM if monitors else 0)
    assert equal(final_state(whole), final_state(parts))
    assert rows(parts)[-1]["left_out_steps"] == 2


def test_the_budget_is_that_of_the_whole_run(tmp_path, shards, capfd):
    with RunDirectory(tmp_path) as directory, poisoned() as steps:
        run = make_run(tmp_path, "simclr", shards, directory=directory, on_nan="skip", nan_budget=1, save_every=1)
        with pytest.raises(RunError, match=r"was not applied: .* Already 1 left out \(train\.nan_budget\)"):
            train(run)
    assert len(steps) == 2
    assert f"Step {steps[0] + 1} is left out (1 of at most 1, train.on_nan=skip): on rank 0" in capfd.readouterr().err
    with RunDirectory(tmp_path) as directory, poisoned(), pytest.raises(RunError, match="was not applied"):
        train(make_run(tmp_path, "simclr", shards, directory=directory, on_nan="skip", nan_budget=1, save_every=1))


def states_of_a_rank(output: Path, shards: Path) -> tuple[dict[str, Tensor], list[int]]:
    with poisoned() as steps:
        run = make_run(output, "moco", shards, batch_size=4, on_nan="skip", check_ranks=1)
        assert train(run) == 0
    return {name: tensor.clone() for name, tensor in run.method.state_dict().items()}, steps


def test_all_ranks_leave_out_the_same_steps(tmp_path, shards):
    (first, on_first), (second, on_second) = (
        child.result() for child in start_ranks(states_of_a_rank, tmp_path / "run", shards)
    )
    assert len(on_first) + len(on_second) == 2, "one rank has the image"
    assert equal(first, second)
    assert all(torch.isfinite(tensor).all() for tensor in first.values())


def test_statistics_are_those_from_before(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    network(torch.randn(2, 3, 4, 4))
    statistics = NormStatistics(network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    statistics.keep()
    network(torch.full((2, 3, 4, 4), torch.nan))
    assert not equal(before, network.state_dict())
    statistics.restore()
    assert equal(before, network.state_dict())


class Scaled:
    """An optimizer behind a GradScaler, as Accelerate wraps it."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler, self.param_groups = optimizer, scaler, optimizer.param_groups

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def zero_grad(self, *, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)


def test_a_scaler_goes_on_after_a_step_that_is_left_out(tmp_path, shards):
    run = make_run(tmp_path, "simclr", shards, on_nan="skip", steps=12)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run.accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        scaler=scaler,
        no_sync=lambda network: nullcontext(),
        backward=lambda loss: scaler.scale(loss).backward(),
    )
    wrapped = Scaled(build_optimizer(run.method, run.optim), scaler)
    with (
        poisoned() as steps,
        recorded() as states,
        mock.patch("ssl_pipeline.training.loop.wrap", return_value=(run.method, wrapped)),
        mock.patch("ssl_pipeline.training.loop.save_run"),
    ):
        run.accelerator.wait_for_everyone = lambda: None
        assert train(run) == 0
    first = steps[0]
    assert equal(states[first], states[first - 1])
    assert not equal(states[first + 1], states[first])
    assert scaler.get_scale() < 8.0


def test_checks_that_may_skip_tell_of_the_newest_step_alone(shards):
    told = list[str]()
    checks = StepChecks(mock.Mock(), budget=1, say=told.append)
    for number, loss in enumerate([1.0, torch.nan, 1.0]):
        tensor = torch.tensor(loss)
        checks.add(
            number,
            loss=tensor,
            gradient_norm=tensor,
            sample_ids=torch.tensor([], dtype=torch.long),
            watched=tensor,
            signal_number=0,
        )
        checks.read()
        assert checks.is_left_out == (number == 1)
    assert (checks.left_out, len(told)) == (1, 1)
