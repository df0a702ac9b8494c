"""A checkpoint is continued only by the run that it belongs to, and from the same place on all ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_pipeline.backbones.exported import exported_step
from ssl_pipeline.config import Config, ConfigError, MayChange, dump
from ssl_pipeline.distributed import rank
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import RunDirectory, read_status
from ssl_pipeline.run.optimizer_state import optimizer_tensors
from ssl_pipeline.run.state import CheckpointError, RunState
from ssl_pipeline.schedule import Schedule
from ssl_pipeline.training.resume import begin_or_keep, check_identity, check_settings, load_newest, optimizer_identity
from ssl_pipeline.training.run import Output, Run, resumed_clock
from tests.ranks import run_on_ranks
from tests.runs import make_run
from tests.tiny import make_method, write_shards

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
    return load_newest(Checkpoints(folder / "checkpoints"), method, optimizer, Output(folder, None, identity=IDENTITY))


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
        load_newest(checkpoints, method, build_optimizer(method, ADAMW), Output(tmp_path, None))


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


class Length(Config):
    """A section of the settings below."""

    steps: MayChange[int] = 9


class Settings(Config):
    """Settings of a command."""

    seed: int = 0
    lr: MayChange[float] = 0.1
    train: Length = Length()


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Iterator[Run]:
    """A run with settings in a directory of its own."""
    with RunDirectory(tmp_path / "run") as directory:
        made = make_run(tmp_path / "run", "simclr", shards, directory=directory)
        made.output = replace(made.output, settings=Settings())
        directory.write_config(dump(Settings()))
        yield made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


def with_settings(run: Run, **settings: object) -> Run:
    run.output = replace(run.output, settings=Settings(**settings))
    return run


def test_a_resumed_run_says_what_it_changes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run.output.directory
    begin_or_keep(with_settings(run, lr=0.2), directory, position=8)
    assert capsys.readouterr().out == "Changed since the last start of this run: lr: 0.1 -> 0.2\n"
    assert "0.2" in directory.config_path.read_text()
    assert read_status(directory.path).state == "running"


@pytest.mark.parametrize(("before", "said"), [(16, "global batch: 16 -> 8"), (8, ""), (None, "")])
def test_a_run_that_goes_on_with_other_processes_says_its_batch(run: Run, before, said, capsys) -> None:
    begin_or_keep(run, run.output.directory, position=8, global_batch=before)
    assert capsys.readouterr().out == (f"Changed since the last start of this run: {said}\n" if said else "")


def test_a_complete_run_keeps_all_that_it_has(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run.output.directory
    directory.status("done", step=12)
    (directory.path / "backbone.safetensors").write_bytes(b"exported")
    before = {path: path.read_bytes() for path in directory.path.iterdir() if path.is_file() and path.name != ".lock"}
    begin_or_keep(with_settings(run, lr=0.2, train=Length(steps=4)), directory, position=96)
    kept = "keeps the settings of its last start: lr=0.1 (given now: 0.2); train.steps=9 (given now: 4)\n"
    assert kept in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_export_that_is_gone_is_made_again(run: Run) -> None:
    directory = run.output.directory
    directory.status("done", step=12)
    begin_or_keep(run, directory, position=96)
    assert exported_step(directory.path) == 12


def test_settings_that_end_before_an_unfinished_run_are_refused(run: Run) -> None:
    directory = run.output.directory
    directory.status("preempted", step=12)
    with pytest.raises(ConfigError, match=r"unfinished run that is past the end .*train.steps=9 \(given now: 4\)"):
        begin_or_keep(with_settings(run, train=Length(steps=4)), directory, position=96)
    assert "steps: 9" in directory.config_path.read_text()


def test_a_refusal_names_the_keys_both_values_and_what_to_do(tmp_path: Path) -> None:
    check_settings(tmp_path, Settings(), Settings(lr=0.3, train=Length(steps=3)))
    sentence = f"{tmp_path} holds a run with seed=0; this one has seed=7. A run keeps these: set them as they were"
    with pytest.raises(
        ConfigError, match=f"^{re.escape(sentence)} to go on, .*backbone.weights={re.escape(str(tmp_path))} "
    ):
        check_settings(tmp_path, Settings(), Settings(seed=7, lr=0.3))


def test_a_checkpoint_knows_its_settings_whatever_config_yaml_says(run: Run) -> None:
    method = make_method("simclr")
    optimizer = build_optimizer(method, ADAMW)
    state = RunState(8, 8, optimizer_identity(method, optimizer), settings=Settings().model_dump())
    checkpoints = Checkpoints(run.output.path / "checkpoints")
    checkpoints.save(state, {"method": method.state_dict(), "optimizer": optimizer_tensors(optimizer)})
    run.output.directory.write_config(dump(Settings(seed=1)))
    with pytest.raises(ConfigError, match="holds a run with seed=0; this one has seed=1"):
        load_newest(checkpoints, method, optimizer, with_settings(run, seed=1).output)
    load_newest(checkpoints, method, optimizer, with_settings(run, lr=0.5).output)


def test_an_older_checkpoint_needs_its_config_yaml(tmp_path: Path) -> None:
    save(tmp_path)
    method = make_method("simclr")
    output = Output(tmp_path, None, settings=Settings(), identity=IDENTITY)
    with pytest.raises(ConfigError, match=r"has checkpoints, but no config\.yaml"):
        load_newest(Checkpoints(tmp_path / "checkpoints"), method, build_optimizer(method, ADAMW), output)


@pytest.mark.parametrize(("length", "total"), [({"steps": 12}, 12), ({"steps": None, "epochs": 2.0}, 21)])
def test_steps_are_those_really_made_when_the_batch_changes(
    tmp_path: Path, shards: Path, length: dict[str, object], total: int
) -> None:
    small = make_run(tmp_path / "run", "fixmatch", shards, batch_size=4, **length)  # 48 images
    saved = RunState(24, 8, steps=3, labelled_position=12)  # with batches of 8 and 4
    clock = resumed_clock(small.clock, small.train, saved)
    assert [clock.steps_made(position) for position in (24, 28, 32)] == [3, 4, 5]
    assert clock.position_after(5) == 32
    assert clock.total_steps == total
    assert [clock.labelled_position(position) for position in (24, 28)] == [12, 14]
    assert clock.progress(24).step == 6, "schedules follow the position"
