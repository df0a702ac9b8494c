"""Any backbone of a run is read from its checkpoints as it was in memory, whether the run has ended or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import ssl_pipeline
from ssl_pipeline.backbones import BackboneConfig, create_backbone, load_from_checkpoint, save_backbone
from ssl_pipeline.config import ConfigError, load
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval import knn
from ssl_pipeline.eval.features.extract import extract_features
from ssl_pipeline.eval.features.models import ModelConfig, baselines_of, open_model
from ssl_pipeline.eval.knn import KnnConfig
from ssl_pipeline.run.directory import RunDirectory
from ssl_pipeline.training.loop import train
from ssl_pipeline.training.run import Run
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
    with pytest.raises(
        ConfigError, match=rf"^run=\S* has {missing} checkpoint\. Let it train first: accelerate launch"
    ):
        load_from_checkpoint(tmp_path, which=which)


def test_a_network_that_is_built_otherwise_now_is_refused_in_one_line(dino, monkeypatch):
    other = "ssl_pipeline.backbones.runs.create_backbone"
    monkeypatch.setattr(other, lambda config: torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="step-00000003 holds a backbone that this version builds otherwise") as error:
        load_from_checkpoint(dino.output.path)
    assert "\n" not in str(error.value)


# Through an evaluator


def test_the_export_is_what_is_measured_unless_something_else_is_asked_for(tmp_path, dino):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    assert open_model(load(ModelConfig, [f"run={output}"])).label == "teacher, step 3"
    save_backbone(output, dino.method.backbones()["student"], dino.preprocessing)
    labels = [
        open_model(load(ModelConfig, [f"run={output}", *arguments])).label
        for arguments in ([], ["which=teacher"], ["checkpoint=2"], ["which=student", "checkpoint=2"])
    ]
    assert labels == ["pretrained", "teacher, step 3", "teacher, step 2", "student, step 2"]


def test_the_random_baseline_is_that_of_the_export(tmp_path, dino):
    output = shutil.copytree(dino.output.path, tmp_path / "run")
    before = baselines_of(open_model(load(ModelConfig, [f"run={output}"])))["random"]
    save_backbone(output, dino.method.backbone, dino.preprocessing)
    after = baselines_of(open_model(load(ModelConfig, [f"run={output}"])))["random"]
    assert before.about == after.about
    torch.testing.assert_close(before.backbone.state_dict(), after.backbone.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("argument", ["which=student", "checkpoint=2"])
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
