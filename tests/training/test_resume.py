"""A checkpoint is continued only by the run that it belongs to, and from the same place on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_pipeline.config import ConfigError
from ssl_pipeline.distributed import rank
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.run.optimizer_state import optimizer_tensors
from ssl_pipeline.run.state import CheckpointError, RunState
from ssl_pipeline.schedule import Schedule
from ssl_pipeline.training.resume import check_identity, load_newest, optimizer_identity, write_settings
from tests.ranks import run_on_ranks
from tests.tiny import make_method

ADAMW = OptimConfig(name="adamw", lr=Schedule(value=1e-3))
IDENTITY = {"method": "simclr", "seed": "0"}


def save(folder: Path, *, position: int = 8) -> nn.Module:
    """A checkpoint after one step of a method; returns the method."""
    method = make_method("simclr", seed=1)
    optimizer = build_optimizer(method, ADAMW)
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    tensors = {"method": method.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    state = RunState(position, 8, IDENTITY | optimizer_identity(method, optimizer))
    Checkpoints(folder / "checkpoints").save(state, tensors)
    return method


def load(folder: Path, method: nn.Module, config: OptimConfig = ADAMW):
    optimizer = build_optimizer(method, config)
    return load_newest(Checkpoints(folder / "checkpoints"), method, optimizer, IDENTITY)


def test_method_and_optimizer_come_back(tmp_path):
    saved_method, method = save(tmp_path), make_method("simclr")
    saved = load(tmp_path, method)
    assert saved.state.position == 8
    assert all(torch.equal(tensor, method.state_dict()[name]) for name, tensor in saved_method.state_dict().items())


def test_without_a_checkpoint_nothing_changes(tmp_path):
    method = make_method("simclr")
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    assert load(tmp_path, method) is None
    assert all(torch.equal(tensor, method.state_dict()[name]) for name, tensor in before.items())


def test_another_order_of_parameters_is_refused(tmp_path):
    save(tmp_path)
    method = make_method("simclr")
    modules = method.encoder._modules
    method.encoder._modules = {name: modules[name] for name in reversed(modules)}
    with pytest.raises(
        ConfigError, match=r"holds a run with optimizer AdamW on \d+ tensors \(.*\); this one has AdamW"
    ):
        load(tmp_path, method)


def test_another_rule_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(ConfigError, match=r"with optimizer AdamW on .* this one has LARS on"):
        load(tmp_path, make_method("simclr"), OptimConfig(name="lars", lr=Schedule(value=1e-3)))


@pytest.mark.parametrize("change", ["shape", "more", "less"])
def test_another_network_is_refused_in_one_sentence_and_keeps_its_weights(tmp_path, change):
    save(tmp_path)
    method = make_method("simclr")
    if change == "shape":
        method.encoder.head = nn.Linear(24, 9)
    elif change == "more":
        method.more = nn.Linear(2, 2)
    else:
        del method.encoder.head
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with pytest.raises(ConfigError, match=r"holds a run whose '.*' has shape .*; this one's has") as error:
        load(tmp_path, method)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, method.state_dict()[name]) for name, tensor in before.items())


def test_the_first_fact_that_differs_is_named(tmp_path):
    check_identity(tmp_path, {"method": "dino", "seed": "0", "images": "3"}, {"method": "dino", "seed": "0"})
    with pytest.raises(ConfigError, match="holds a run with seed 0; this one has 1"):
        check_identity(tmp_path, {"method": "dino", "seed": "0"}, {"method": "dino", "seed": "1"})


def test_damaged_checkpoints_are_an_error(tmp_path):
    save(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001" / "method.safetensors").write_bytes(b"")
    checkpoints, method = Checkpoints(tmp_path / "checkpoints", report=lambda _: None), make_method("simclr")
    with pytest.raises(CheckpointError, match="None of the 1 checkpoints"):
        load_newest(checkpoints, method, build_optimizer(method, ADAMW), IDENTITY)


def refusal_on_this_rank(folders: list[Path]) -> str:
    with pytest.raises(ConfigError) as error:
        load(folders[rank()], make_method("simclr"))
    return str(error.value)


def test_ranks_that_find_different_checkpoints_all_refuse(tmp_path):
    save(tmp_path / "first", position=8)
    save(tmp_path / "second", position=16)
    sentences = run_on_ranks(refusal_on_this_rank, [tmp_path / "first", tmp_path / "second"])
    assert all("different checkpoints" in sentence for sentence in sentences)
    assert "one at image 8, one at image 16. Put output=DIR on storage that all machines share." in sentences[0]
    sentences = run_on_ranks(refusal_on_this_rank, [tmp_path / "first", tmp_path / "nothing"])
    assert all("one at image 8, none." in sentence for sentence in sentences)


def test_a_resumed_run_says_what_it_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory(tmp_path / "run") as directory:
        directory.write_config("optim: {lr: {value: 0.1}}\ntrain: {steps: 9}\n")
        write_settings(directory, "optim: {lr: {value: 0.2}}\ntrain: {steps: 9}\n", complete=False)
        assert capsys.readouterr().out == "Changed since the last start of this run: optim.lr.value: 0.1 -> 0.2\n"
        assert "0.2" in directory.config_path.read_text()


def test_a_complete_run_keeps_the_settings_it_was_made_with(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as directory:
        directory.write_config("train: {steps: 9}\n")
        directory.status("done", step=9)
        write_settings(directory, "train: {steps: 4}\n", complete=True)
        assert directory.config_path.read_text() == "train: {steps: 9}\n"


def test_settings_that_end_before_an_unfinished_run_are_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as directory:
        directory.write_config("train: {steps: 9}\n")
        directory.status("preempted", step=6)
        with pytest.raises(ConfigError, match=r"unfinished run that is past the end .*train.steps: 9 -> 4"):
            write_settings(directory, "train: {steps: 4}\n", complete=True)
