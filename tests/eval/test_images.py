"""Evaluators take folders and zips of images as they take shards, and pack them once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline.commands.console import COMMANDS
from ssl_pipeline.config import Config
from ssl_pipeline.config.descriptions import described_fields
from ssl_pipeline.eval import classifier, clustering, few_shot, images, knn, label_free, linear, suite
from ssl_pipeline.packing.make_shards import MakeShards, make_shards

COLOURS = {"cat": (200, 60, 60), "dog": (60, 60, 200)}
MODULES = sorted(COMMANDS.values())
ROOMS = ("ssl_pipeline.eval.", "ssl_pipeline.commands.report")
Call = Callable[..., int]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(generator.normal(colour, 60, (16, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    def command(module: object, *arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["command", "workers=0", *arguments])
        return module.command()

    return command


def test_folders_and_zips_are_measured_as_their_shards(
    run: Path, photos: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        settings = {"source": str(photos / part), "output": tmp_path / part / "images", "workers": 1}
        make_shards(MakeShards.model_validate(settings))
    archive = shutil.make_archive(str(tmp_path / "test"), "zip", photos / "test")
    reports = []
    for train, test in (
        (tmp_path / "train/images", tmp_path / "test/images"),
        (photos / "train", photos / "test"),
        (photos / "train", archive),
    ):
        assert call(knn, f"run={run}", f"train={train}", f"test={test}", "k=3") == 0
        reports.append(json.loads((run / "eval/knn.json").read_text()))
    top1 = {report["top1"] for report in reports}
    assert len(top1) == 1
    assert len({report["protocol_hash"] for report in reports}) == 1
    assert sorted(place.name[:-9] for place in (run / "eval/images").iterdir()) == ["test", "test", "train"]


def test_they_are_packed_once_and_anew_where_they_have_changed(
    photos: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["backbone=raw_pixels", "size=4", f"train={photos / 'train'}", f"test={photos / 'test'}", "k=3"]
    assert call(knn, *arguments) == 0
    (shard,) = (tmp_path / "cache/ssl_pipeline/images").glob("test-*/images/*.tar")
    packed = shard.stat().st_mtime_ns
    assert call(knn, *arguments) == 0
    assert shard.stat().st_mtime_ns == packed
    capsys.readouterr()
    Image.new("RGB", (9, 9)).save(photos / "test" / "cat" / "new.png")
    assert call(knn, *arguments) == 0
    assert "1 new (cat/new.png). It is packed again." in capsys.readouterr().out
    assert call(label_free, "backbone=raw_pixels", "size=4", f"images={photos / 'test'}", "num_images=100") == 0
    assert "checking images" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run={run}", "test=photoz"], "test=photoz does not exist. Needed: an image, a folder or"),
        (["run={run}", "test=photos*.tar"], "'photos*.tar' holds no .tar shard."),
        (["run={photos}/train", "test={photos}/test"], "has no backbone.safetensors, which pretraining writes when it"),
        (["run={run}/none", "test={photos}/test"], "none must be the directory of a run. There is no such directory."),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_packed(
    run: Path, photos: Path, call: Call, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    before = sorted([*run.rglob("*"), *photos.rglob("*")])
    assert call(knn, f"train={photos}/train", *(argument.format(run=run, photos=photos) for argument in arguments)) == 2
    assert sentence in capsys.readouterr().err
    assert sorted([*run.rglob("*"), *photos.rglob("*")]) == before


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (knn, ["run={run}", "which=nope", "train={photos}/train", "test={photos}/test"], "has no checkpoint"),
        (knn, ["run={run}", "step=7777", "train={photos}/train", "test={photos}/test"], "7777"),
        (
            linear,
            ["backbone=resnet18", "output={run}", "inputs=tokens", "train={photos}/train", "test={photos}/test"],
            "inputs=tokens needs a network with tokens",
        ),
        (label_free, ["run={run}", "which=nope", "images={photos}/test"], "has no checkpoint"),
        (suite, ["run={run}", "which=nope", "train={photos}/train", "test={photos}/test"], "has no checkpoint"),
        (classifier, ["run={run}", "test={photos}/test"], "classifier"),
    ],
)
def test_a_network_that_is_not_there_is_told_before_anything_is_packed(
    module: object, arguments: list[str], sentence: str, run: Path, photos: Path, call: Call, capsys
) -> None:
    before = sorted([*run.rglob("*"), *photos.rglob("*")])
    assert call(module, *(argument.format(run=run, photos=photos) for argument in arguments)) == 2
    assert sentence in capsys.readouterr().err
    assert sorted([*run.rglob("*"), *photos.rglob("*")]) == before


FLAT = "has no labels; {task} needs them{where}. 4 of 4 images have no usable label; the first, '"


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        (knn, ["train={flat}", "test={photos}/test"], FLAT.format(task="k-NN", where=" in train and test")),
        (clustering, ["images={flat}"], FLAT.format(task="clustering", where="")),
        (label_free, ["images={flat}"], "need 6 images or more. {flat} has 4."),
        (
            few_shot,
            ["train={photos}/test", "test={photos}/test", "per_class=9"],
            "than {photos}/test has of one of its",
        ),
        (knn, ["train={photos}/test", "test={photos}/test", "k=2"], "images of {photos}/test are in {photos}/test too"),
    ],
)
def test_errors_name_the_folder_that_was_given_and_no_shards(
    module: object,
    arguments: list[str],
    sentence: str,
    photos: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "flat").mkdir()
    for number in range(4):
        Image.new("RGB", (9, 9)).save(tmp_path / f"flat/{number}.png")
    given = [argument.format(flat=tmp_path / "flat", photos=photos) for argument in arguments]
    call(module, "backbone=raw_pixels", "size=4", *given)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "warning"))]
    told = " ".join(lines)
    assert sentence.format(flat=tmp_path / "flat", photos=photos) in told
    assert ".tar" not in told
    assert "cache" not in told


def test_one_image_is_no_set_of_labelled_images(
    photos: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = photos / "test/cat/0.png"
    assert call(knn, "backbone=raw_pixels", "size=4", f"train={one}", f"test={photos / 'test'}") == 2
    assert "has no labels; k-NN needs them" in capsys.readouterr().err


def takes_folders(module: str) -> bool:
    """Whether a command has a setting of images that may be a folder."""
    schemas = [one for one in vars(import_module(module)).values() if isinstance(one, type) and issubclass(one, Config)]
    fields = [(name, field) for schema in schemas for name, field in described_fields(schema).items()]
    return any(name in images.IMAGES and "folder" in (field.description or "") for name, field in fields)


def test_all_evaluators_take_them(photos: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(config: Config, directory: Path | None, **others: object) -> Config:
        seen.append(type(config).__name__)
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "with_shards", stop)
    monkeypatch.setattr("ssl_pipeline.commands.report.with_shards", stop)
    own = "ssl_pipeline.eval.dense"  # takes images with their masks, and reads the files themselves
    taking = [module for module in MODULES if module.startswith(ROOMS) and module != own and takes_folders(module)]
    for module in taking:
        keys = ("run", "images") if module.endswith(("label_free", "clustering")) else ("run", "train", "test")
        keys = ("run", "test") if module.endswith("classifier") else keys
        monkeypatch.setattr("sys.argv", ["command", *(f"{key}={photos}" for key in keys)])
        assert import_module(module).command() == 130, module
    assert len(seen) == len(taking) >= 10
