"""What a run of one's own images ends with: commands that work as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_pipeline
from ssl_pipeline.backbones.classifier import save_classifier
from ssl_pipeline.commands.afterwards import features_in_python, measuring
from ssl_pipeline.commands.embed import EmbedConfig, embed
from ssl_pipeline.commands.predict import PredictConfig
from ssl_pipeline.config import load
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.classifier import ClassifierConfig
from ssl_pipeline.eval.knn import KnnConfig, evaluate_knn
from ssl_pipeline.eval.report import ReportConfig, report_page
from ssl_pipeline.packing.make_shards import MakeShards, make_shards
from tests.runs import write_recipe

ROOT = Path(__file__).parents[2]


def folder(place: Path, count: int, classes: tuple[str, ...]) -> Path:
    for number in range(count):
        path = place / classes[number % len(classes)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (18, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return place


@pytest.mark.other
def test_the_commands_at_the_end_of_a_run_work_as_they_stand(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    photos = folder(tmp_path / "my photos", 24, ("cat", "dog"))
    recipe = write_recipe(tmp_path / "tiny.yaml", "simclr", tmp_path)
    overrides = {"train.steps": 1, "data": {"workers": 0}}
    run = ssl_pipeline.pretrain(images=photos, recipe=recipe, output=tmp_path / "a run", overrides=overrides)
    printed = capsys.readouterr().out
    command = re.search(r"Evaluate with: (.*)", printed)[1]
    program, module, name, *arguments = shlex.split(command)
    assert (program, module, name) == ("python", "-m", "eval.knn")
    report = evaluate_knn(load(KnnConfig, arguments))
    assert report["protocol"]["num_test"] == 24
    page = load(ReportConfig, shlex.split(re.search(r"As a page: (.*)", printed)[1])[3:])
    assert "loss" in report_page(page)
    embed(load(EmbedConfig, [*shlex.split(re.search(r"Features of its images: (.*)", printed)[1])[3:], "workers=0"]))
    assert (tmp_path / "a run" / "features.npz").is_file()
    shown = printed.split("In Python:\n")[1].replace("    ", "").replace("photo.jpg", str(photos / "cat" / "0.png"))
    names: dict[str, object] = {}
    exec(compile(shown, "shown", "exec"), names)
    assert isinstance(names["features"], torch.Tensor)
    assert names["features"].shape == (24, run.backbone.embed_dim)
    assert len(names["keys"]) == 24


@pytest.mark.parametrize(
    ("count", "classes", "own"),
    [(24, (".",), True), (24, ("a",), True), (12, ("a", "b"), True), (24, ("a", "b"), False)],
)
def test_where_no_own_label_serves_labelled_shards_are_asked_for(tmp_path, count, classes, own):
    make_shards(MakeShards(source=str(folder(tmp_path / "x", count, classes)), output=tmp_path / "s", workers=1))
    said = measuring(Path("run"), open_shards(tmp_path / "s"), str(tmp_path / "s") if own else None)
    assert said.endswith(" run=run train=SHARDS test=SHARDS")


def test_without_a_checkout_the_console_command_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_shards(MakeShards(source=str(folder(tmp_path / "x", 24, ("a", "b"))), output=tmp_path / "s", workers=1))
    said = measuring(Path("run"), open_shards("s"), "s")
    assert said == "Evaluate with: ssl-pipeline knn run=run train=s test=s leave_one_out=true"
    assert features_in_python("s").endswith("ssl_pipeline.embed(backbone, 's')")


def test_a_run_with_a_classifier_is_measured_by_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    make_shards(MakeShards(source=str(folder(tmp_path / "x", 24, ("a", "b"))), output=tmp_path / "s", workers=1))
    save_classifier(tmp_path / "run", torch.nn.Linear(2, 2), ["a", "b"])
    said = measuring(tmp_path / "run", open_shards(tmp_path / "s"), str(tmp_path / "s"))
    first, second = (shlex.split(line.partition(": ")[2]) for line in said.splitlines())
    assert first[:3] == ["python", "-m", "eval.classifier"]
    assert load(ClassifierConfig, first[3:]).run == tmp_path / "run"
    assert second[:3] == ["python", "-m", "eval.predict"]
    assert load(PredictConfig, second[3:]).output == tmp_path / "run" / "labels.csv"
