"""Any backbone of a run is read from its checkpoints as it was in memory, whether the run has ended or not."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ssl_pipeline
from ssl_pipeline.backbones import (
    BackboneConfig,
    create_backbone,
    load_backbone,
    load_from_checkpoint,
    runs,
    save_backbone,
)
from ssl_pipeline.backbones.exported import about_weights, exported_step
from ssl_pipeline.backbones.weights import tensors_of
from ssl_pipeline.config import ConfigError, load
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval import knn
from ssl_pipeline.eval.export import ExportConfig, export
from ssl_pipeline.eval.features.extract import extract_features
from ssl_pipeline.eval.features.models import ModelConfig, baselines_of, open_model
from ssl_pipeline.eval.knn import KnnConfig
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.training.loop import train
from ssl_pipeline.training.run import Run
from tests.run.test_directory import trainer
from tests.runs import Happening, happens, make_run
from tests.tiny import CNN, VIT, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


def preempted(output: Path, name: str, shards: Path, *, backbone: BackboneConfig = VIT) -> Run:
    """A run that a signal stopped after step 3, with checkpoints of steps 2 and 3; what it holds in memory."""
    output.mkdir()
    with RunDirectory(output) as directory, happens(Happening("SIGTERM", at=2)):
        run = make_run(output, name, shards, backbone=backbone, save_every=2, directory=directory)
        assert train(run) == 15
    return run


@pytest.fixture(scope="module")
def dino(tmp_path_factory, shards) -> Run:
    return preempted(tmp_path_factory.mktemp("runs") / "dino", "dino", shards)


def features(network: torch.nn.Module, shards: Path, run: Run) -> torch.Tensor:
    return extract_features(network, open_shards(shards), run.preprocessing, batch_size=16, workers=0)[0]


def test_student_and_teacher_differ_and_are_those_in_memory(dino, shards):
    found = {name: load_from_checkpoint(dino.output.path, which=name) for name in ("student", "teacher")}
    read = {name: features(one.backbone, shards, dino) for name, one in found.items()}
    assert (read["student"] - read["teacher"]).abs().max() > 1e-3
    for name, network in dino.method.backbones().items():
        assert found[name].preprocessing == dino.preprocessing
        assert found[name].step == 3
        assert torch.equal(read[name], features(network, shards, dino)), name


def test_without_a_name_the_first_is_read(dino):
    assert load_from_checkpoint(dino.output.path).name == next(iter(dino.method.backbones())) == "teacher"


def test_batch_norm_statistics_come_along(tmp_path, shards):
    run = preempted(tmp_path / "run", "moco", shards, backbone=CNN)
    for name, network in run.method.backbones().items():
        read = load_from_checkpoint(tmp_path / "run", which=name).backbone
        torch.testing.assert_close(read.state_dict(), network.state_dict(), rtol=0, atol=0)


def test_the_weights_that_a_run_began_with_are_not_needed_again(tmp_path, shards, dino):
    weights = tmp_path / "first" / "backbone.safetensors"
    save_backbone(weights.parent, dino.method.backbone, dino.preprocessing)
    run = preempted(tmp_path / "run", "dino", shards, backbone=VIT.model_copy(update={"weights": str(weights)}))
    weights.unlink()
    read = load_from_checkpoint(tmp_path / "run").backbone
    torch.testing.assert_close(read.state_dict(), run.method.backbone.state_dict(), rtol=0, atol=0)


def test_a_step_can_be_picked(dino):
    assert load_from_checkpoint(dino.output.path, step=2).step == 2
    with pytest.raises(ConfigError, match=r"step-00000002 must be the directory of a run\. It is a checkpoint of "):
        ssl_pipeline.load(dino.output.path / "checkpoints" / "step-00000002")
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 7\. It has 2, 3\."):
        load_from_checkpoint(dino.output.path, step=7)


def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path, dino, capsys):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    file = output / "checkpoints" / "step-00000003" / "method.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert load_from_checkpoint(output).step == 2
    assert "step-00000003 is not used: method.safetensors is damaged" in capsys.readouterr().out


def test_the_package_loads_an_unfinished_run_ready_for_use(dino, shards):
    for arguments in ({}, {"which": "student"}, {"which": "student", "step": 2}):
        backbone = ssl_pipeline.load(str(dino.output.path), **arguments)
        found = load_from_checkpoint(dino.output.path, **arguments).backbone
        assert not any(part.training for part in backbone.modules())
        assert backbone.preprocessing == dino.preprocessing
        torch.testing.assert_close(backbone.state_dict(), found.state_dict(), rtol=0, atol=0)


def test_an_unfinished_run_and_one_of_its_checkpoints_are_weights_to_start_from(dino):
    path = dino.output.path
    for weights, which, step in (
        (path, None, 3),
        (path, "student", 3),
        (path / "checkpoints" / "step-00000002", "student", 2),
    ):
        backbone = create_backbone(VIT.model_copy(update={"weights": str(weights), "weights_from": which}))
        expected = load_from_checkpoint(path, which=which, step=step).backbone
        torch.testing.assert_close(backbone.state_dict(), expected.state_dict(), rtol=0, atol=0)
        count = len(backbone.model.state_dict())
        assert backbone.origin.text == f"{which or 'teacher'} of step {step} of {path}, took {count} of {count} tensors"
    with pytest.raises(ConfigError, match=r"has no backbone which=target\. .*It has teacher, student\."):
        create_backbone(VIT.model_copy(update={"weights": str(path), "weights_from": "target"}))


def test_an_unknown_name_is_refused_with_the_known_ones(dino):
    with pytest.raises(ConfigError) as error:
        load_from_checkpoint(dino.output.path, which="techer")
    assert str(error.value) == (
        f"run={dino.output.path} has no backbone which=techer. Did you mean 'teacher'? It has teacher, student."
    )


@pytest.mark.parametrize(("which", "missing"), [(None, "no backbone.safetensors, which .* and no"), ("student", "no")])
def test_a_run_without_checkpoints_is_refused(tmp_path, which, missing):
    with pytest.raises(ConfigError, match=rf"^run=\S* has {missing} checkpoint\. Train it first: accelerate launch"):
        load_from_checkpoint(tmp_path, which=which)


@pytest.mark.parametrize(
    ("save_every", "due"),
    [
        ("1ep", "after 1ep (train.save_every=1ep)"),
        (300, "after 300 steps (train.save_every=300)"),
        (0, "when the run ends (train.save_every=0)"),
    ],
)
def test_who_asks_for_a_run_that_trains_is_told_to_wait_for_its_first_checkpoint(tmp_path, save_every, due):
    (tmp_path / "config.yaml").write_text(f"train: {{save_every: {save_every}}}\n")
    rows = [{"step": step, "epoch": step / 100, "position": 16 * step} for step in (1, 50)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with trainer(tmp_path) as pid, pytest.raises(ConfigError) as error:
        load_from_checkpoint(tmp_path, which="student")
    told = re.sub(r" on [^)]*\)", ")", str(error.value))
    assert told == (
        f"run={tmp_path} has no checkpoint yet. It is training (pid {pid}), at step 50 by metrics.jsonl. "
        f"Try again after its first checkpoint, which is written {due}."
    )
    with pytest.raises(ConfigError, match=r"no checkpoint\. Train it first"):
        load_from_checkpoint(tmp_path)


def test_a_run_that_has_just_begun_is_said_to_train(tmp_path):
    with trainer(tmp_path), pytest.raises(ConfigError, match=r"with nothing in metrics\.jsonl yet\. Try again after"):
        load_from_checkpoint(tmp_path)


def test_a_network_that_is_built_otherwise_now_is_refused_in_one_line(dino, monkeypatch):
    other = "ssl_pipeline.backbones.runs.create_backbone"
    monkeypatch.setattr(other, lambda config: torch.nn.Linear(2, 2))
    with pytest.raises(
        ConfigError, match="step-00000003 holds a backbone that this version builds differently"
    ) as error:
        load_from_checkpoint(dino.output.path)
    assert "\n" not in str(error.value)


# Through an evaluator


def test_the_export_is_what_is_measured_unless_something_else_is_asked_for(tmp_path, dino):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    assert open_model(load(ModelConfig, [f"run={output}"])).label == "teacher, step 3"
    save_backbone(output, dino.method.backbones()["student"], dino.preprocessing, step=3)
    expected = {
        (): "pretrained",
        ("which=teacher",): "teacher, step 3",
        ("step=2",): "teacher, step 2",
        ("step=3",): "pretrained",
        ("checkpoint=2",): "teacher, step 2",
        ("which=student", "step=2"): "student, step 2",
    }
    assert {arguments: measured(output, *arguments) for arguments in expected} == expected


def test_an_older_step_than_the_exports_is_said_to_be_that(tmp_path, dino, capsys):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    save_backbone(output, dino.method.backbones()["student"], dino.preprocessing, step=3)
    assert measured(output, "step=2") == "teacher, step 2"
    assert capsys.readouterr().out == (
        f"{output} has an export of step 3; step 2 is measured (step=3 measures the export).\n"
    )


def measured(output: Path, *arguments: str) -> str:
    return open_model(load(ModelConfig, [f"run={output}", *arguments])).label


def test_of_a_run_that_was_extended_and_failed_the_newest_is_measured_and_said(tmp_path, dino, capsys):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    save_backbone(output, dino.method.backbone, dino.preprocessing, step=1)
    assert measured(output) == "teacher, step 3"
    note = f"{output} was trained on after its export, of step 1; step 3 is measured (step=1 measures the export).\n"
    assert capsys.readouterr().out == note
    assert measured(output, "step=1") == "pretrained"
    shutil.rmtree(output / "checkpoints")
    assert measured(output) == "pretrained"


@pytest.mark.parametrize(("state", "label"), [("done", "pretrained"), ("failed", "teacher, step 3")])
def test_an_export_that_tells_no_step_is_the_newest_if_the_run_is_done(tmp_path, dino, state, label):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    save_backbone(output, dino.method.backbone, dino.preprocessing)
    with RunDirectory(output) as directory:
        directory.status(state, step=3)
    assert measured(output) == label


def test_the_weights_of_a_run_are_told_with_their_step_and_their_sum(tmp_path, dino):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    checkpoint = output / "checkpoints" / "step-00000002"

    def about(place: Path | str, *tensors: float, which: str | None = None, sha256: str | None = None) -> dict:
        return about_weights(str(place), which=which, sha256=sha256, tensors={"a": torch.tensor(tensors)})

    for place, step in ((output, 3), (checkpoint, 2)):
        parent = {"run": str(output), "step": step}
        assert about(place, sha256="12ab") == {"from": str(place), "sha256": "12ab", "parent run": parent}
    save_backbone(output, dino.method.backbone, dino.preprocessing, step=4)
    assert about(output)["parent run"] is None, "no config.yaml says that a run was there"
    (output / "config.yaml").write_text("seed: 0")
    assert about(output)["parent run"] == {"run": str(output), "step": 4}
    assert about(output, which="student")["parent run"] == {"run": str(output), "step": 3}
    assert about(tmp_path)["parent run"] is None
    tags = [about("a1_in1k", value, 0.0) for value in (1.0, 1.0, 2.0)]
    assert tags[0] == tags[1]
    assert tags[0]["sha256"] == hashlib.sha256(b"a" + np.array([1, 0], dtype="<f4").tobytes()).hexdigest()
    assert tags[0]["sha256"] != tags[2]["sha256"]
    assert tags[0]["parent run"] is None


@pytest.mark.parametrize(("step", "origin"), [(2, "teacher of step 3 of "), (3, "backbone.safetensors")])
def test_a_run_starts_from_the_newest_backbone_of_another(tmp_path, dino, step, origin):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    save_backbone(output, dino.method.backbone, dino.preprocessing, step=step)
    assert origin in create_backbone(VIT.model_copy(update={"weights": str(output)})).origin.text


def test_step_and_its_earlier_name_may_not_contradict_each_other():
    with pytest.raises(ConfigError, match="step=2 and checkpoint=3 are the same setting"):
        load(ModelConfig, ["run=x", "step=2", "checkpoint=3"])


# Exported by a command


def test_any_backbone_of_a_run_is_exported_as_timm_reads_it(tmp_path, dino):
    arguments = [f"run={dino.output.path}", f"output={tmp_path / 'student'}", "which=student", "step=2"]
    export(load(ExportConfig, arguments))
    read, _ = load_backbone(tmp_path / "student")
    saved = load_from_checkpoint(dino.output.path, which="student", step=2).backbone
    torch.testing.assert_close(read.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert exported_step(tmp_path / "student") == 2
    with pytest.raises(ConfigError, match=r"has a backbone\.safetensors already"):
        export(load(ExportConfig, arguments))


def test_the_random_baseline_is_that_of_the_export(tmp_path, dino):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    before = baselines_of(open_model(load(ModelConfig, [f"run={output}"])))["random"]
    save_backbone(output, dino.method.backbone, dino.preprocessing)
    after = baselines_of(open_model(load(ModelConfig, [f"run={output}"])))["random"]
    assert before.about == after.about
    torch.testing.assert_close(before.backbone.state_dict(), after.backbone.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("argument", ["which=student", "checkpoint=2", "step=2"])
def test_only_runs_have_checkpoints(argument):
    with pytest.raises(ConfigError, match=f"{argument.split('=')[0]} belongs to run=DIR"):
        load(ModelConfig, ["backbone=resnet18", argument])


def test_what_is_picked_has_a_report_of_its_own(tmp_path, dino, shards):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    images = [f"train={shards}", f"test={shards}", "k=3", "workers=0"]
    for picked in ([], ["which=student"], ["which=student", "checkpoint=2"]):
        knn.main(load(KnnConfig, [f"run={output}", *images, *picked]))
    weights = {
        path.name: json.loads(path.read_text())["protocol"]["subject"]["weights"]
        for path in (output / "eval").glob("*.json")
    }
    assert weights == {
        "knn.json": "teacher of checkpoints/step-00000003",
        "knn-student.json": "student of checkpoints/step-00000003",
        "knn-student-step-2.json": "student of checkpoints/step-00000002",
    }
    assert len(list((output / "eval" / "cache").iterdir())) == 3, "teacher and student have features of their own"


def test_a_checkpoint_that_is_not_finite_is_not_measured(dino, monkeypatch):
    def broken(checkpoint, prefix):
        return {name: tensor * float("nan") for name, tensor in tensors_of(checkpoint, prefix).items()}

    monkeypatch.setattr(runs, "tensors_of", broken)
    with pytest.raises(ConfigError, match=r"\S+3: \S+ is not finite"):
        load_from_checkpoint(dino.output.path)
