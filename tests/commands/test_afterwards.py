"""What a run of one's own images ends with: commands that work as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ssl_pipeline
from ssl_pipeline.backbones.classifier import save_classifier
from ssl_pipeline.commands.afterwards import in_python, measuring
from ssl_pipeline.commands.embed import EmbedConfig, embed
from ssl_pipeline.commands.predict import PredictConfig
from ssl_pipeline.config import ConfigError, load
from ssl_pipeline.eval import labelled_sets
from ssl_pipeline.eval.classifier import ClassifierConfig
from ssl_pipeline.eval.knn import KnnConfig, evaluate_knn
from ssl_pipeline.eval.report import ReportConfig, report_page
from ssl_pipeline.eval.table import read_run
from ssl_pipeline.packing.make_shards import MakeShards, make_shards
from ssl_pipeline.packing.packed_once import pack_once
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


def run_of(tmp_path: Path, **settings: object) -> Path:
    """A run's directory as far as these commands look into it."""
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run/config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "a run"


def shards_of(source: Path, output: Path, **settings: object) -> str:
    make_shards(MakeShards(source=str(source), output=output, workers=1, **settings))
    return str(output)


@pytest.mark.parametrize(("count", "classes"), [(24, (".",)), (24, ("a",)), (12, ("a", "b"))])
def test_where_no_own_label_serves_labelled_shards_are_asked_for(tmp_path, count, classes):
    own = shards_of(folder(tmp_path / "x", count, classes), tmp_path / "s")
    run = run_of(tmp_path, data={"shards": own}, knn=None)
    assert measuring(run, own).endswith(f" run='{run}' train=SHARDS test=SHARDS")
    assert measuring(tmp_path / "none", None).endswith("/none train=SHARDS test=SHARDS")


@pytest.mark.parametrize("data", [{"image_key": "input.jpg"}, {}])
def test_shards_that_an_evaluator_could_not_open_are_not_named(tmp_path, monkeypatch, data):
    own = shards_of(folder(tmp_path / "x", 24, ("a", "b")), tmp_path / "s")
    run = run_of(tmp_path, data={"shards": own, **data}, knn=None)
    if not data:
        monkeypatch.setattr(labelled_sets, "open_shards", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert measuring(run, own).endswith(" train=SHARDS test=SHARDS")


def measured_with(run: Path, own: str | None) -> tuple[str, str, bool]:
    """What the command at the end of a run measures: its images as a shell and eval.knn read them."""
    settings = load(KnnConfig, shlex.split(measuring(run, own).partition(": ")[2])[3:])
    assert settings.run == run
    return settings.train, settings.test, settings.leave_one_out


def test_images_with_labels_are_measured_by_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = shards_of(folder(tmp_path / "x", 24, ("a", "b")), tmp_path / "my shards")
    assert measured_with(run_of(tmp_path, data={"shards": own}), own) == (own, own, True)


def test_the_sets_of_the_monitor_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    train, val = (shards_of(folder(tmp_path / name, 24, ("a", "b")), tmp_path / f"{name} s") for name in ("x", "y"))
    run = run_of(tmp_path, data={"shards": "elsewhere"}, knn={"train": train, "val": val})
    assert measured_with(run, "elsewhere") == (train, val, False)
    with pytest.raises(ConfigError, match=re.escape(f"run='{run}' train='{train}' test='{val}' baselines=true")):
        read_run(run)
    (run / "config.yaml").write_text(yaml.safe_dump({"knn": {"train": train, "val": None}}))
    assert measured_with(run, None) == (train, train, True)


@pytest.mark.parametrize("kind", ["holdout", "folders", "one set"])
def test_a_test_set_beside_the_images_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(ROOT)
    if kind == "holdout":
        shards_of(folder(tmp_path / "x", 30, ("a", "b")), tmp_path / "my data", holdout="10%")
        own, expected = str(tmp_path / "my data/train"), (tmp_path / "my data/train", tmp_path / "my data/test")
    else:
        photos = tmp_path / "my data"
        for part, count in (("train", 24), ("test", 4)):
            folder(photos / part, count, ("a", "b"))
        packed = pack_once(str(photos / "train" if kind == "folders" else photos), tmp_path / "packed")
        own, expected = str(packed), (packed if kind == "folders" else photos / "train", photos / "test")
    run = run_of(tmp_path, data={"shards": own}, knn=None)
    assert measured_with(run, own) == (*map(str, expected), False)
    folder(tmp_path / "my data/other", 4, ("c", "d"))
    (tmp_path / "my data/test").rename(tmp_path / "gone")
    (tmp_path / "my data/other").rename(tmp_path / "my data/test")  # of other classes
    assert str(tmp_path / "my data/test") not in measuring(run, own)


def test_without_a_checkout_the_console_command_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards_of(folder(tmp_path / "x", 24, ("a", "b")), tmp_path / "s")
    run_of(tmp_path, data={"shards": "s"})
    said = measuring(Path("a run"), "s")
    assert said == "Evaluate with: ssl-pipeline knn run='a run' train=s test=s leave_one_out=true"
    assert in_python(Path("run"), "s").endswith("ssl_pipeline.embed(backbone, 's')")


@pytest.mark.parametrize("known", [True, False])
def test_a_run_with_a_classifier_is_measured_by_it(tmp_path, monkeypatch, known):
    monkeypatch.chdir(ROOT)
    own = shards_of(folder(tmp_path / "x", 24, ("a", "b")), tmp_path / "s")
    run = run_of(tmp_path, data={"shards": own}, classifier={"val": own} if known else None)
    save_classifier(run, torch.nn.Linear(2, 2), ["a", "b"])
    first, second = (shlex.split(line.partition(": ")[2]) for line in measuring(run, own).splitlines())
    assert first[:3] == ["python", "-m", "eval.classifier"]
    assert load(ClassifierConfig, first[3:]).run == run
    assert load(ClassifierConfig, first[3:]).test == (own if known else "SHARDS")
    assert second[:3] == ["python", "-m", "eval.predict"]
    assert load(PredictConfig, second[3:]).output == run / "labels.csv"
    assert load(PredictConfig, second[3:]).source == own
