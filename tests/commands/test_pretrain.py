"""The command as an operator knows it: killed, stopped, misused, and run again."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import time
from functools import partial
from itertools import chain
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_pipeline.backbones import load_backbone, load_classifier
from ssl_pipeline.backbones.exported import exported_step
from ssl_pipeline.commands.afterwards import in_python
from ssl_pipeline.commands.pretrain import warn_of_other_classes
from ssl_pipeline.eval.knn import KnnConfig, evaluate_knn
from ssl_pipeline.files import sha256_of
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.directory import RunDirectory
from tests.ranks import Child, start, start_ranks
from tests.runs import (
    Happening,
    command,
    equal,
    final_state,
    losses,
    rows,
    status,
    trained,
    wait_until,
    write_recipe,
)
from tests.tiny import write_shards

NUM_IMAGES = 48
OLDER_RUN = Path(__file__).parents[1] / "run" / "older_run"  # of ssl-pipeline 0.2.0
FORMAT_1 = Path(__file__).parents[1] / "run" / "format_1" / "manifest.json"  # of ssl-pipeline 0.1.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, shards) -> str:
    return f"recipe={write_recipe(tmp_path_factory.mktemp('recipe') / 'tiny.yaml', 'dino', shards)}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, recipe) -> Path:
    """The run that others must be equal to."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert start(command, [recipe, f"output={output}"]).wait() == 0
    return output


def run(*argv: str, happening: Happening | None = None) -> tuple[int, str]:
    """Exit code and output of one run."""
    child = start(command, list(argv), happening)
    return child.wait(), child.printed()


def check_same(output: Path, expected: Path) -> None:
    assert losses(output) == losses(expected)
    assert equal(final_state(output), final_state(expected))
    assert status(output)["state"] == "done"
    assert (output / "backbone.safetensors").read_bytes() == (expected / "backbone.safetensors").read_bytes()


def error_of(printed: str) -> str:
    """The one line of an error; nothing like a traceback may stand beside it."""
    assert "Traceback" not in printed, printed
    errors = [line for line in printed.splitlines() if line.startswith("error")]
    assert len(errors) == 1, printed
    return errors[0]


def files_of(folder: Path) -> dict[str, bytes]:
    """All but the lock, which a refused run may touch."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def has_other_rows(output: Path, num_rows: int, child: Child) -> bool:
    return len(rows(output)) != num_rows or child.process.exitcode is not None


# Stopped and run again


def test_a_run_leaves_what_others_read(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "status.json", "heartbeat.json", "checkpoints"} <= names
    assert {"backbone.safetensors", "backbone.json"} <= names
    assert [row["step"] for row in rows(uninterrupted)] == list(range(1, 13))
    needed = {"step", "epoch", "images", "loss", "learning_rate", "images_per_second", "data_wait"}
    assert all(needed <= row.keys() for row in rows(uninterrupted))
    told = {"state": "done", "step": 12, "checkpoint": 12, "reason": "", "time": ""}
    assert status(uninterrupted) | {"time": ""} == told
    assert exported_step(uninterrupted) == 12
    (start,) = json.loads((uninterrupted / "run.json").read_text())["starts"]
    assert {"command", "commit", "versions", "hardware", "data", "weights"} <= start.keys()
    assert (start["data"]["images"], len(start["data"]["fingerprint"])) == (NUM_IMAGES, 64)


def test_the_same_command_gives_the_same_run(tmp_path, recipe, shards, uninterrupted):
    code, printed = run(recipe, f"output={tmp_path}")
    assert code == 0
    assert "\ninitial weights: random initialisation\n" in printed
    assert printed.rstrip().endswith(in_python(tmp_path, str(shards)))
    check_same(tmp_path, uninterrupted)


def test_a_run_that_is_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, recipe, uninterrupted):
    moments = random.Random(0)
    argv = [recipe, f"output={tmp_path}", "data.workers=1"]
    for _ in range(4):
        rows_before = len(rows(tmp_path))
        child = start(command, argv)
        wait_until(partial(has_other_rows, tmp_path, rows_before, child))
        child.process.join(moments.uniform(0, 0.15))
        child.process.kill()
        if child.wait() == 0:
            break
    assert start(command, argv).wait() == 0
    check_same(tmp_path, uninterrupted)


def test_a_run_that_is_killed_inside_a_checkpoint_goes_on_bit_for_bit(tmp_path, recipe, uninterrupted):
    output, half_written = tmp_path / "run", tmp_path / "half written"
    assert run(recipe, f"output={output}", happening=Happening("SIGTERM", at=5))[0] == 128 + signal.SIGTERM
    child = start(command, [recipe, f"output={output}"], Happening(slow_save=half_written))
    wait_until(half_written.exists)
    assert list((output / "checkpoints").glob(".tmp-*"))
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert status(output)["state"] == "running"
    assert run(recipe, f"output={output}")[0] == 0
    check_same(output, uninterrupted)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_stops_the_run_in_good_order(tmp_path, recipe, uninterrupted, name):
    code, printed = run(recipe, f"output={tmp_path}", happening=Happening(name, at=5))
    number = signal.Signals[name]
    assert code == 128 + number
    assert status(tmp_path)["state"] == "preempted"
    assert status(tmp_path)["step"] == 6, "the step that the signal found is finished"
    assert f"Stopped by signal {int(number)} after step 6; run again to go on." in printed
    assert len(rows(tmp_path)) == 6
    code, printed = run(recipe, f"output={tmp_path}")
    assert code == 0
    assert "Resuming after step 6" in printed
    check_same(tmp_path, uninterrupted)


def test_a_complete_run_is_left_as_it_is(tmp_path, recipe):
    argv = [recipe, f"output={tmp_path}", "train.steps=3"]
    assert run(*argv)[0] == 0
    before = files_of(tmp_path)
    code, printed = run(*argv)
    assert code == 0
    assert "complete already, at step 3" in printed
    assert files_of(tmp_path) == before
    assert run(recipe, f"output={tmp_path}", "train.log_every=7", "train.steps=2")[0] == 0
    assert files_of(tmp_path) == before


def killed_in_the_export(argv: list[str]) -> None:
    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch("ssl_pipeline.training.saving.save_backbone", kill):
        command(argv)


def test_a_run_that_is_killed_before_its_export_is_exported_by_the_same_command(tmp_path, recipe, uninterrupted):
    argv = [recipe, f"output={tmp_path}"]
    assert start(killed_in_the_export, argv).wait() == -signal.SIGKILL
    assert (status(tmp_path)["state"], status(tmp_path)["checkpoint"]) == ("running", 12)
    assert not (tmp_path / "backbone.safetensors").exists()
    code, printed = run(*argv, "data.workers=1")
    assert code == 0
    assert "Nothing is left to train; step 12 is exported" in printed
    check_same(tmp_path, uninterrupted)


def test_a_longer_run_continues_a_complete_one(tmp_path, recipe):
    assert run(recipe, f"output={tmp_path}", "train.steps=2")[0] == 0
    assert run(recipe, f"output={tmp_path}", "train.steps=4")[0] == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_what_a_run_may_change_it_says(tmp_path, recipe):
    argv = [recipe, f"output={tmp_path}"]
    assert run(*argv, happening=Happening("SIGTERM", at=5))[0] == 143
    code, printed = run(*argv, "optim.lr=1e-4", "train.precision=bf16", "data.batch_size=6", "train.steps=8")
    assert code == 0
    for change in ("optim.lr.value: 0.001 -> 0.0001", "train.precision: no -> bf16", "data.batch_size: 8 -> 6"):
        assert change in printed


def test_steps_never_fall_when_the_batch_changes(tmp_path, recipe):
    argv = [recipe, f"output={tmp_path}", "train.steps=null", "train.epochs=2"]  # 96 images
    for number, batch in ((5, 8), (3, 3), (2, 12)):
        stop = Happening("SIGTERM", at=number)
        assert run(*argv, f"data.batch_size={batch}", happening=stop)[0] in (0, 143)
    logged = rows(tmp_path)
    images = [row["images"] for row in logged]
    assert [row["step"] for row in logged] == list(range(1, len(logged) + 1))
    assert images == [8, 16, 24, 32, 40, 48, 51, 54, 57, 60, 72, 84, 96]
    assert [row["epoch"] for row in logged] == [position / NUM_IMAGES for position in images]
    assert status(tmp_path)["step"] == 13
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000013"]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 14))


def test_a_run_in_steps_makes_as_many_whatever_their_size(tmp_path, recipe):
    argv = [recipe, f"output={tmp_path}"]
    assert run(*argv, happening=Happening("SIGTERM", at=5))[0] == 143
    assert run(*argv, "data.batch_size=4")[0] == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    assert rows(tmp_path)[-1]["images"] == 6 * 8 + 6 * 4


def test_no_labelled_image_is_passed_over_when_the_batch_changes(tmp_path, shards):
    recipe = write_recipe(tmp_path / "fixmatch.yaml", "fixmatch", shards)
    argv = [f"recipe={recipe}", f"output={tmp_path / 'run'}", "data.batch_size=8"]
    record = tmp_path / "ids"
    stop = Happening("SIGTERM", at=2, record_labelled=record)
    assert run(*argv, "data.labelled.batch_size=6", happening=stop)[0] == 143
    assert run(*argv, "data.labelled.batch_size=5", happening=Happening(record_labelled=record))[0] == 0
    seen = [image for line in record.with_suffix(".0").open() for image in json.loads(line)]
    assert len(seen) == 3 * 6 + 9 * 5
    assert sorted(seen[:NUM_IMAGES]) == list(range(NUM_IMAGES))


def test_a_checkpoint_of_the_version_before_is_continued(tmp_path):
    """tests/run/older_run: simclr by ssl-pipeline 0.2.0, saved after step 3 of 6 and killed after step 4."""
    shutil.copytree(OLDER_RUN, tmp_path / "older")
    recipe = write_recipe(tmp_path / "simclr.yaml", "simclr", tmp_path / "older" / "shards")
    argv = [f"recipe={recipe}", "train.steps=6", "data.batch_size=4", "train.save_every=3"]
    code, printed = run(*argv, f"output={tmp_path / 'older' / 'run'}")
    assert code == 0
    assert "Resuming after step 3" in printed
    assert run(*argv, f"output={tmp_path / 'whole'}")[0] == 0
    whole, older = rows(tmp_path / "whole"), rows(tmp_path / "older" / "run")
    assert [row["step"] for row in older] == [1, 2, 3, 4, 5, 6]
    assert [row.get("images", row.get("position")) for row in older] == [row["images"] for row in whole]
    assert [row["loss"] for row in older] == pytest.approx([row["loss"] for row in whole], rel=1e-4)
    shutil.rmtree(tmp_path / "older" / "run")
    shutil.copytree(OLDER_RUN / "run", tmp_path / "older" / "run")
    code, printed = run(*argv, f"output={tmp_path / 'older' / 'run'}", "data.block_shards=1")
    assert code == 2
    assert "with data.block_shards=16; this one has data.block_shards=1." in error_of(printed)


def test_a_run_without_its_checkpoints_does_not_start_over(tmp_path, recipe, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = files_of(tmp_path / "run")
    for argv in ([], ["train.steps=20"]):
        code, printed = run(recipe, f"output={tmp_path / 'run'}", *argv)
        assert code == 2
        assert "but no checkpoint to go on from" in error_of(printed)
        assert files_of(tmp_path / "run") == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, recipe, uninterrupted):
    assert run(recipe, f"output={tmp_path}", happening=Happening("SIGKILL", at=2))[0] == -signal.SIGKILL
    assert len(rows(tmp_path)) == 2
    assert run(recipe, f"output={tmp_path}")[0] == 0
    check_same(tmp_path, uninterrupted)


def test_run_json_tells_the_starting_weights_and_the_run_that_they_are_of(tmp_path, recipe, uninterrupted):
    file = uninterrupted / "backbone.safetensors"
    assert run(recipe, f"output={tmp_path}", "train.steps=2", f"backbone.weights={file}")[0] == 0
    (started,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    parent = {"run": str(uninterrupted), "step": 12}
    assert started["weights"] == {"from": str(file), "sha256": sha256_of(file), "parent run": parent}


def test_starting_weights_may_have_moved_but_not_changed(tmp_path, recipe, uninterrupted):
    first, moved, other = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    shutil.copy(uninterrupted / "backbone.safetensors", first)
    arguments = recipe, f"output={tmp_path}/run", "train.save_every=2"
    assert run(*arguments, "train.steps=2", f"backbone.weights={first}")[0] == 0
    tensors = load_file(first)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other)
    code, printed = run(*arguments, "train.steps=3", f"backbone.weights={other}")
    assert code == 2
    assert re.search(r"holds a run with backbone\.weights=.*; this one has .*, with other content", printed)
    first.rename(moved)
    assert run(*arguments, "train.steps=3", f"backbone.weights={moved}")[0] == 0
    assert status(tmp_path / "run")["state"] == "done"
    code, printed = run(*arguments, "train.steps=4", f"backbone.weights={first}")
    assert code == 2
    assert f"backbone.weights={first} does not exist" in printed


def test_each_start_stands_in_run_json(tmp_path, recipe):
    argv = [recipe, f"output={tmp_path}"]
    assert run(*argv, happening=Happening("SIGTERM", at=5))[0] == 143
    assert run(*argv, "train.steps=8")[0] == 0
    first, second = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert (first["from_step"], second["from_step"], second["from_images"]) == (0, 6, 48)
    (tmp_path / "run.json").write_text("anything")
    assert run(*argv, "train.steps=9")[0] == 0, "it decides nothing"


def test_a_run_that_ends_inside_its_warm_up_says_so(tmp_path, recipe):
    code, printed = run(recipe, f"output={tmp_path}", "train.steps=1")
    assert code == 0
    assert "warning: optim.lr.warmup=2 is 2 steps, but the run ends after 1: 0.001 is never reached.\n" in printed


# Checkpoints


def test_a_run_that_was_killed_can_be_measured(tmp_path, recipe, shards):
    assert run(recipe, f"output={tmp_path}", happening=Happening("SIGKILL", at=6))[0] == -signal.SIGKILL
    images = {"train": str(shards), "test": str(shards), "k": (3,), "workers": 0}
    teacher, student = (evaluate_knn(KnnConfig(run=tmp_path, which=which, **images)) for which in (None, "student"))
    assert teacher["protocol"]["subject"]["weights"] == "teacher of checkpoints/step-00000004"
    assert student["protocol"]["subject"]["weights"] == "student of checkpoints/step-00000004"
    assert not (tmp_path / "backbone.safetensors").exists()


def test_a_run_of_an_older_version_is_refused_in_one_line_and_kept(tmp_path, recipe, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        shutil.copy(FORMAT_1, checkpoint / "manifest.json")
    before = files_of(tmp_path / "run")
    code, printed = run(recipe, f"output={tmp_path / 'run'}", "train.steps=14")
    assert code == 2
    assert "has checkpoint format 1 of ssl-pipeline 0.1.0, and this is ssl-pipeline" in error_of(printed)
    assert files_of(tmp_path / "run") == before


def test_a_learnt_classifier_is_exported_with_its_backbone(tmp_path, shards):
    recipe = write_recipe(tmp_path / "fixmatch.yaml", "fixmatch", shards)
    state = start(trained, [f"recipe={recipe}", f"output={tmp_path / 'run'}", "train.steps=2"]).result()
    classifier, _ = load_classifier(tmp_path / "run")
    saved = Checkpoints(tmp_path / "run" / "checkpoints").load_latest().state.classifier
    assert (saved.num_classes, "teacher." in saved.prefix) == (classifier.out_features, True)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, state[saved.prefix + name])
    backbone, _ = load_backbone(tmp_path / "run")
    assert classifier.in_features == backbone.embed_dim


def damage(checkpoint: Path) -> None:
    file = checkpoint / "method.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_of_two_checkpoints_the_damaged_one_is_passed_over(tmp_path, recipe, uninterrupted):
    assert run(recipe, f"output={tmp_path}", happening=Happening("SIGTERM", at=9))[0] == 143
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    damage(newest)
    code, printed = run(recipe, f"output={tmp_path}")
    assert code == 0
    assert f"{newest} is not used: method.safetensors is damaged" in printed
    assert "Resuming after step 8" in printed
    check_same(tmp_path, uninterrupted)


def test_without_a_usable_checkpoint_the_run_does_not_start_over(tmp_path, recipe):
    assert run(recipe, f"output={tmp_path}", happening=Happening("SIGTERM", at=9))[0] == 143
    for checkpoint in (tmp_path / "checkpoints").glob("step-*"):
        damage(checkpoint)
    before = files_of(tmp_path)
    code, printed = run(recipe, f"output={tmp_path}")
    assert code == 2
    assert "None of the 2 checkpoints" in error_of(printed)
    assert files_of(tmp_path) == before


# Directories


def test_a_directory_in_use_is_refused(tmp_path, recipe, uninterrupted):
    before = files_of(uninterrupted)
    with RunDirectory(uninterrupted):
        code, printed = run(recipe, f"output={uninterrupted}")
    assert code == 2
    assert f"{uninterrupted} is in use by another run (pid {os.getpid()} on " in error_of(printed)
    assert files_of(uninterrupted) == before


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["seed=1"], "holds a run with seed=0; this one has seed=1."),
        (["backbone.arguments.depth=2"], "with backbone.arguments.depth=1; this one has backbone.arguments.depth=2."),
        (["method.head_hidden_dim=8"], "with method.head_hidden_dim=16; this one has method.head_hidden_dim=8."),
        (["optim.name=sgd"], "with optim.name=adamw; this one has optim.name=sgd."),
        (["optim.weight_decay_on=all"], "with optim.weight_decay_on=matrices; this one has "),
        (["data.block_shards=2"], "with data.block_shards=16; this one has data.block_shards=2."),
        (["data.max_pixels=1000"], "with data.max_pixels=50000000; this one has data.max_pixels=1000."),
        (["augment.global.scale=[0.2,0.3]"], "; this one has augment.global.scale=[0.2, 0.3]."),
        (["augment.local=null"], "this one has augment.local=null."),
    ],
)
def test_another_run_in_the_directory_is_refused_and_kept(recipe, uninterrupted, argv, sentence):
    before = files_of(uninterrupted)
    code, printed = run(recipe, f"output={uninterrupted}", *argv)
    assert code == 2
    assert sentence in error_of(printed)
    assert files_of(uninterrupted) == before


def test_another_method_in_the_directory_is_refused_and_kept(tmp_path, shards, uninterrupted):
    other = write_recipe(tmp_path / "simclr.yaml", "simclr", shards)
    before = files_of(uninterrupted)
    code, printed = run(f"recipe={other}", f"output={uninterrupted}")
    assert code == 2
    assert f"{uninterrupted} holds a run with method.name=dino, " in error_of(printed)
    assert files_of(uninterrupted) == before


@pytest.mark.parametrize(("shard_sizes", "number"), [((20, 9), 29), ((24, 24), 48)])
def test_other_images_in_the_directory_are_refused_and_kept(tmp_path, recipe, uninterrupted, shard_sizes, number):
    before = files_of(uninterrupted)
    other = write_shards(tmp_path / "other", shard_sizes)
    code, printed = run(recipe, f"output={uninterrupted}", f"data.shards={other}")
    assert code == 2
    assert re.search(rf"holds a run with images 48 \(\w{{8}}\); this one has {number} \(\w{{8}}\)\.", error_of(printed))
    assert files_of(uninterrupted) == before


@pytest.mark.parametrize("content", ["", "{", "a: 1\n"], ids=["empty", "no YAML", "other keys"])
def test_a_directory_with_an_unreadable_config_is_refused_and_kept(tmp_path, recipe, content):
    (tmp_path / "config.yaml").write_text(content)
    code, printed = run(recipe, f"output={tmp_path}")
    assert code == 2
    assert f"{tmp_path / 'config.yaml'} is not readable as the settings of a run" in error_of(printed)
    assert (tmp_path / "config.yaml").read_text() == content


# Mistakes

MISTAKES = {
    "batch": (
        ["data.batch_size=49"],
        "The global batch is larger than the data set: 49 per process * 1 processes * 1 ",
    ),
    "accumulated batch": (["train.accumulate=7"], "8 per process * 1 processes * 7 accumulated = 56, but "),
    "missing group": (["augment.global=null", "augment.view.size=16"], "DINO needs the view group augment.global."),
    "unneeded group": (["augment.third.size=16"], "DINO does not use the view group augment.third."),
    "backbone": (["backbone.name=vit_tiny_patch16_242"], "No timm model 'vit_tiny_patch16_242'. Did you mean"),
    "shards": (["data.shards=/nowhere"], "/nowhere"),
    "neither epochs nor steps": (["train.steps=null"], "set either epochs or steps. Got neither"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, recipe, mistake):
    argv, sentence = MISTAKES[mistake]
    code, printed = run(recipe, f"output={tmp_path / 'run'}", *argv)
    assert code == 2
    assert sentence in error_of(printed)
    assert not (tmp_path / "run").exists()


def test_half_a_launcher_is_refused(tmp_path, recipe):
    child = start(launched_apart, [recipe, f"output={tmp_path / 'run'}"])
    assert child.wait() == 2
    assert "The environment has WORLD_SIZE=2, but no RANK, LOCAL_RANK" in error_of(child.printed())


def launched_apart(argv: list[str]) -> None:
    os.environ["WORLD_SIZE"] = "2"  # but no rank, no address
    command(argv)


# Faults


def test_a_loss_that_is_not_a_number_stops_before_the_step(tmp_path, recipe):
    assert run(recipe, f"output={tmp_path}", happening=Happening("SIGTERM", at=5))[0] == 143
    checkpoints = files_of(tmp_path / "checkpoints")
    code, printed = run(recipe, f"output={tmp_path}", "data.workers=1", happening=Happening("nan", at=3))
    assert code == 1
    error = error_of(printed)
    assert "Step 10 was not applied: on rank 0 the loss is nan" in error
    assert error.count(".tar, key '0") == 4
    assert "and 4 more" in error
    new = files_of(tmp_path / "checkpoints")
    assert all(new.get(name, content) == content for name, content in checkpoints.items())
    assert max((tmp_path / "checkpoints").glob("step-*")).name == "step-00000008"
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))
    assert status(tmp_path)["state"] == "failed"
    assert status(tmp_path)["reason"] == error.removeprefix("error: ")


def test_a_killed_data_worker_ends_the_run_with_one_line(tmp_path, recipe):
    code, printed = run(recipe, f"output={tmp_path}", "data.workers=1", happening=Happening("kill a worker", at=3))
    assert code == 2
    assert "A data worker died" in error_of(printed)
    assert status(tmp_path)["state"] == "failed"


def test_a_hang_ends_the_process_and_shows_where(tmp_path, recipe):
    argv = [recipe, f"output={tmp_path}", "data.workers=2", "train.hang_timeout=1"]
    code, printed = run(*argv, happening=Happening("hang", at=2))
    assert code == 1
    assert "Timeout: Nothing has happened for 1 s while training" in printed
    assert "_accumulate" in printed
    assert status(tmp_path)["state"] == "failed"
    assert status(tmp_path)["step"] == 2
    assert run(recipe, f"output={tmp_path}")[0] == 0, "nothing that is left holds the directory"


def hanging_start(argv: list[str]) -> None:
    with mock.patch("ssl_pipeline.commands.pretrain.open_images", side_effect=wait_for_images):
        command(argv)


def wait_for_images(config: object) -> None:
    time.sleep(60)


def test_a_start_that_hangs_ends_too(tmp_path, recipe):
    child = start(hanging_start, [recipe, f"output={tmp_path}", "train.hang_timeout=1"])
    assert child.wait() == 1
    assert "Timeout: Nothing has happened for 1 s while starting (train.hang_timeout)." in child.printed()
    assert "wait_for_images" in child.printed()
    assert status(tmp_path)["state"] == "failed"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_stops_the_run_naming_it(tmp_path, recipe, workers):
    folder = write_shards(tmp_path / "shards", corrupt=(5,))
    code, printed = run(recipe, f"output={tmp_path / 'run'}", f"data.shards={folder}", f"data.workers={workers}")
    assert code == 2
    assert "Cannot decode part-000000.tar, key '0005', byte" in error_of(printed)
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_corrupt_image_is_replaced_on_request_and_noted(tmp_path, recipe):
    folder = write_shards(tmp_path / "shards", corrupt=(5,))
    argv = [recipe, f"data.shards={folder}", "data.bad_samples=substitute"]
    assert run(*argv, f"output={tmp_path / 'run'}", "data.bad_sample_budget=0.1")[0] == 0
    noted = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(entry["sample"], entry["key"]) for entry in noted] == [(5, "0005")]
    code, printed = run(*argv, f"output={tmp_path / 'other'}", "data.bad_sample_budget=0.01")
    assert code == 2
    assert "1 of 48 images cannot be decoded, more than data.bad_sample_budget=0.01 allows" in error_of(printed)


# Several processes


def run_together(*argv: str, happening: Happening | None = None) -> tuple[list[int], str]:
    children = start_ranks(command, list(argv), happening)
    codes = [child.wait() for child in children]
    return codes, "".join(child.printed() for child in children)


def test_monitors_refuse_images_that_are_others_on_another_node(tmp_path, recipe):
    """A node may name its images otherwise; they must be the same: half of each would be measured."""
    sizes = {"a": (9,), "b": (6, 3), "c": (7,)}
    places = {name: str(write_shards(tmp_path / name, of)) for name, of in sizes.items()}
    for other in ("b", "c"):
        children = [
            Child(command, [*argv, f"spectrum.val={places[val]}"], environment=environment)
            for val, (argv, environment) in zip(("a", other), ranked(recipe, tmp_path / f"run-{other}"), strict=True)
        ]
        assert sorted(child.wait() for child in children) == [1, 2]
        assert "All processes must have the same images of spectrum.val. " in children[1].printed()


def ranked(recipe: str, output: Path) -> list[tuple[list[str], dict[str, str]]]:
    """The arguments and the environment of two ranks."""
    argv = [recipe, f"output={output}", "data.batch_size=4", "spectrum.every=1", "spectrum.at_start=true"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [(argv, {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]


def test_a_signal_that_one_rank_gets_stops_all_in_the_same_step(tmp_path, recipe):
    argv = [recipe, f"output={tmp_path}", "data.batch_size=4"]
    codes, _ = run_together(*argv, happening=Happening("SIGTERM", at=5, on_rank=1))
    assert codes == [143, 143]
    assert status(tmp_path)["step"] == 6
    codes, printed = run_together(*argv)
    assert codes == [0, 0]
    assert "Resuming after step 6" in printed
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


def test_a_loss_that_is_not_a_number_on_one_rank_stops_all_and_names_that_rank(tmp_path, recipe):
    record = tmp_path / "ids"
    argv = [recipe, f"output={tmp_path / 'run'}", "data.batch_size=4"]
    codes, printed = run_together(*argv, happening=Happening("nan", at=2, on_rank=1, record=record))
    assert codes == [1, 1]
    assert "Traceback" not in printed
    assert "Step 3 was not applied: on rank 1 the loss is nan" in printed
    there = json.loads(record.with_suffix(".1").read_text().splitlines()[2])
    assert all(f"key '{sample:04d}'" in printed for sample in there)


def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(tmp_path, recipe, uninterrupted):
    argv = [recipe, f"output={tmp_path}", "data.batch_size=4"]
    codes, printed = run_together(*argv, happening=Happening("SIGKILL", at=6, on_rank=1))
    assert codes == [1, -signal.SIGKILL]
    assert "Another process of this run has ended" in error_of(printed)
    assert status(tmp_path)["state"] == "failed"
    assert run_together(*argv)[0] == [0, 0]
    assert dict(losses(tmp_path)) == pytest.approx(dict(losses(uninterrupted)), rel=1e-5)


def test_a_process_that_is_short_of_memory_says_so_and_ends_the_others(tmp_path, recipe):
    codes, printed = run_together(
        recipe, f"output={tmp_path}", "data.batch_size=4", happening=Happening("no memory", at=2, on_rank=1)
    )
    assert codes == [1, 1]
    assert "error on rank 1: Out of memory with train.precision=no" in printed
    assert "Try a smaller data.batch_size than 4" in printed
    assert "error: Another process of this run has ended" in printed
    assert "Traceback" not in printed


def test_more_processes_than_shards_share_the_images_all_the_same(tmp_path, recipe):
    record = tmp_path / "ids"
    argv = [recipe, f"output={tmp_path / 'run'}", f"data.shards={write_shards(tmp_path / 'one', (24,))}"]
    children = start_ranks(
        command, [*argv, "data.batch_size=4", "train.epochs=1"], Happening(record=record), world_size=3
    )
    assert [child.wait() for child in children] == [0, 0, 0]
    seen = [json.loads(line) for rank in range(3) for line in record.with_suffix(f".{rank}").open()]
    assert sorted(chain(*seen)) == list(range(24))


def test_one_two_and_one_process_see_every_image_once_per_epoch(tmp_path, recipe):
    record = tmp_path / "ids"
    argv = [recipe, f"output={tmp_path / 'run'}", "train.epochs=2"]
    stop = {"what": "SIGTERM", "record": record}
    assert run(*argv, "data.batch_size=8", happening=Happening(at=2, **stop))[0] == 143  # 24 images
    codes, printed = run_together(*argv, "data.batch_size=2", happening=Happening(at=4, **stop))  # 20 images
    assert codes == [143, 143]
    assert "Changed since the last start of this run: data.batch_size: 8 -> 2; global batch: 8 -> 4\n" in printed
    assert run(*argv, "data.batch_size=13", "data.workers=2", happening=Happening(record=record))[0] == 0  # 52
    first, second = ([json.loads(line) for line in record.with_suffix(f".{rank}").open()] for rank in (0, 1))
    together = [half for halves in zip(first[3:8], second, strict=True) for half in halves]
    order = list(chain(*first[:3], *together, *first[8:]))
    assert len(order) == 2 * NUM_IMAGES
    assert sorted(order[:NUM_IMAGES]) == sorted(order[NUM_IMAGES:]) == list(range(NUM_IMAGES))
    assert order[:NUM_IMAGES] != order[NUM_IMAGES:]


def test_two_processes_take_the_settings_of_one(tmp_path, recipe):
    assert run_together(recipe, f"output={tmp_path}", "data.batch_size=4", "train.steps=2")[0] == [0, 0]
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["data"]["batch_size"] == 4


def test_a_refusal_on_the_first_rank_is_no_traceback_on_the_others(tmp_path, recipe):
    with RunDirectory(tmp_path):
        codes, printed = run_together(recipe, f"output={tmp_path}", "data.batch_size=4")
    assert codes == [2, 1]
    assert "is in use by another run" in printed
    assert "error on rank 1: Another process of this run has ended" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("unlabelled", "labelled", "said"),
    [
        (("cat", "dog", "cow"), ("cow", "hen"), ""),
        (None, ("cow",), ""),
        (("cat",), None, ""),
        (
            ("cat", "dog"),
            ("hen", "ox"),
            "warning: data/a has images of cat, dog, and none of the labelled classes (hen, ox): "
            "is data.shards the right set?\n",
        ),
    ],
)
def test_unlabelled_images_of_other_classes_are_told(unlabelled, labelled, said, capsys):
    warn_of_other_classes(*(mock.Mock(class_names=names, called="data/a") for names in (unlabelled, labelled)))
    assert capsys.readouterr().out == said
