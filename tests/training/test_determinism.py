"""train.deterministic: torch's deterministic algorithms for the time of a run."""

from __future__ import annotations

import os

import pytest
import torch

from ssl_pipeline.config import RunError
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.training.determinism import COST, WORKSPACE, deterministic, explain_nondeterminism
from ssl_pipeline.training.loop import train
from tests.ranks import start
from tests.runs import Happening, command, losses, make_run, write_recipe
from tests.tiny import write_shards


def test_the_algorithms_are_chosen_inside_and_what_was_set_comes_back(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert os.environ[WORKSPACE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before
    assert WORKSPACE not in os.environ


def test_a_workspace_of_ones_own_stays(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic(True):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"


def test_an_operation_without_such_a_form_is_named(tmp_path):
    # what torch says on a GPU, for instance of the backward pass of adaptive average pooling
    def look(*_: object) -> None:
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation."
        )

    shards = write_shards(tmp_path / "shards")
    sentence = "no deterministic form of adaptive_avg_pool2d_backward_cuda on this device"
    with RunDirectory(tmp_path / "run") as directory:
        run = make_run(tmp_path / "run", "simclr", shards, directory=directory, steps=2)
        run.method.forward = look
        with pytest.raises(RunError, match=sentence):
            train(run)
    assert explain_nondeterminism(RuntimeError("another")) is None


def test_a_deterministic_run_is_that_of_every_other_run_on_a_cpu_and_says_so(tmp_path):
    recipe = f"recipe={write_recipe(tmp_path / 'tiny.yaml', 'dino', write_shards(tmp_path / 'shards'))}"
    printed = []
    for name, asked in (("plain", "false"), ("deterministic", "true")):
        child = start(command, [recipe, f"output={tmp_path / name}", f"train.deterministic={asked}"], Happening())
        assert child.wait() == 0
        printed.append(child.printed())
    assert losses(tmp_path / "plain") == losses(tmp_path / "deterministic")
    assert [COST in text for text in printed] == [False, True]
