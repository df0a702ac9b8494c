"""`ssl_pipeline.pretrain`, `embed` and `knn`: the commands as functions of a notebook or a script."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_pipeline
from ssl_pipeline.commands.embed import EmbedConfig
from ssl_pipeline.commands.embed import embed as embed_command
from ssl_pipeline.commands.images import expand
from ssl_pipeline.config import read_yaml
from ssl_pipeline.data.evaluation import EvaluationSet
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.knn import KnnConfig, evaluate_knn
from ssl_pipeline.packing.make_shards import MakeShards, make_shards
from tests.runs import Happening, happens, rows, status, write_recipe
from tests.tiny import write_shards

SHORT = {"train.steps": 2, "train": {"save_every": 2}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, shards) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", "simclr", shards)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe) -> ssl_pipeline.Run:
    return ssl_pipeline.pretrain(recipe=recipe, output=tmp_path_factory.mktemp("run") / "run", overrides=SHORT)


@pytest.fixture
def photos(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 100, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise + np.uint8(150 * (number % 2))).save(path)
    return tmp_path / "photos"


def test_importing_the_package_imports_neither_torch_nor_timm():
    code = "import sys, ssl_pipeline; assert not {'torch', 'timm', 'numpy'} & sys.modules.keys(); "
    code += "assert set(ssl_pipeline.__all__) <= set(dir(ssl_pipeline))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(ssl_pipeline, name).__doc__ for name in ssl_pipeline.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        ssl_pipeline.pretrian  # noqa: B018


def test_a_run_leaves_what_the_command_leaves(finished, shards):
    assert (len(rows(finished.path)), status(finished.path)["state"]) == (2, "done")
    assert finished.shards == str(shards)
    assert not finished.backbone.training
    assert finished.backbone(torch.zeros(1, 3, 16, 16)).shape == (1, finished.backbone.embed_dim)


def test_a_second_run_in_the_same_process_has_its_own_precision(tmp_path, recipe, finished):
    second = ssl_pipeline.pretrain(
        recipe=str(recipe), output=str(tmp_path / "second"), overrides={"train": {"steps": 2, "precision": "bf16"}}
    )
    third = ssl_pipeline.pretrain(recipe=recipe, output=tmp_path / "third", overrides=SHORT)
    losses = [[row["loss"] for row in rows(run.path)] for run in (finished, second, third)]
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


def test_the_same_call_again_finds_the_run_complete(finished, recipe, capsys):
    before, logged = (finished.path / "backbone.safetensors").read_bytes(), rows(finished.path)
    again = ssl_pipeline.pretrain(recipe=recipe, output=finished.path, overrides=SHORT)
    assert "is complete" in capsys.readouterr().out
    assert rows(finished.path) == logged
    assert (again, (again.path / "backbone.safetensors").read_bytes()) == (finished, before)


def test_overrides_are_values_sections_and_paths(tmp_path, recipe, shards):
    overrides = {
        "train": {"steps": 2, "save_every": "50%"},
        "optim.lr": 5e-4,
        "backbone.arguments": {"depth": 2},
        "data.cache_dir": tmp_path,
        "augment.view.scale": (0.5, 1.0),
    }
    run = ssl_pipeline.pretrain(shards=shards, recipe=recipe, output=tmp_path / "run", overrides=overrides)
    assert len(run.backbone.model.blocks) == 2
    settings = read_yaml((run.path / "config.yaml").read_text(), where="config.yaml")
    assert settings["augment"]["view"]["scale"] == [0.5, 1.0]
    assert settings["data"]["cache_dir"] == str(tmp_path)
    lr = settings["optim"]["lr"]
    assert (lr["value"], str(lr["warmup"])) == (5e-4, "2")  # a bare number sets the peak and leaves the rest


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"overrides": {"train.stepz": 3}}, r"train\.stepz.*Did you mean '(train\.)?steps'"),
        ({"overrides": {"data": {"shards": "x"}}}, r"must leave data\.shards to the argument shards"),
        ({"overrides": {"seed": object()}}, r"must hold numbers, text, lists and sections\. Got seed="),
        ({"recipe": "dino_vits61"}, "Did you mean 'dino_vits16'"),
        ({"images": "a", "shards": "b"}, r"Give one of the two\."),
        ({"shards": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_is_a_config_error_in_one_sentence(tmp_path, recipe, arguments, sentence):
    with pytest.raises(ssl_pipeline.ConfigError, match=sentence):
        ssl_pipeline.pretrain(**{"recipe": recipe, "output": tmp_path / "run", **arguments})


def test_what_the_system_refuses_is_a_run_error(tmp_path, recipe, monkeypatch):
    def out_of_memory(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")

    monkeypatch.setattr("ssl_pipeline.commands.pretrain.train", out_of_memory)
    with pytest.raises(ssl_pipeline.RunError, match=r"Out of memory \(2\.50 GiB .*data\.batch_size"):
        ssl_pipeline.pretrain(recipe=recipe, output=tmp_path / "run")


def test_ctrl_c_saves_and_the_same_call_goes_on(tmp_path, recipe):
    before = signal.getsignal(signal.SIGINT)
    with happens(Happening("SIGINT", at=4)), pytest.raises(KeyboardInterrupt):
        ssl_pipeline.pretrain(recipe=recipe, output=tmp_path / "run", overrides={"train.steps": 7})
    assert signal.getsignal(signal.SIGINT) == before
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step-00000005"
    run = ssl_pipeline.pretrain(recipe=recipe, output=tmp_path / "run", overrides={"train.steps": 7})
    assert [row["step"] for row in rows(run.path)] == list(range(1, 8))


def test_another_signal_ends_the_program_with_its_code(tmp_path, recipe):
    with happens(Happening("SIGTERM", at=1)), pytest.raises(SystemExit) as ended:
        ssl_pipeline.pretrain(recipe=recipe, output=tmp_path / "run")
    assert ended.value.code == 128 + signal.SIGTERM


def test_another_thread_is_refused_in_one_sentence(recipe):
    told = []

    def call() -> None:
        try:
            ssl_pipeline.pretrain(recipe=recipe)
        except ssl_pipeline.ConfigError as error:
            told.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert told[0].startswith("pretrain() must be called from the main thread")


def test_images_and_overrides_choose_a_recipe(tmp_path, photos):
    expanded = expand([f"images={photos}", f"output={tmp_path / 'run'}"], {"backbone": {"weights": "resnet18.a1_in1k"}})
    assert expanded[0] == "recipe=continue_cnn_small"


# embed and knn


def test_features_of_shards_are_those_of_the_transform(finished, shards):
    features, keys = ssl_pipeline.embed(finished.backbone, shards, batch_size=16, workers=0)
    index = open_shards(shards)
    assert keys == [f"{number:04d}" for number in range(48)]
    image, _, _ = EvaluationSet(index, 16)[5]
    pixels = image.permute(1, 2, 0)
    with torch.no_grad():
        expected = finished.backbone(finished.backbone.transform()(pixels)[None])
    torch.testing.assert_close(features[5:6], expected)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_features_of_photographs_come_with_their_files(finished, photos, tmp_path, kind):
    (photos / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff none")
    source = photos
    if kind == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "archive"), "zip", photos))
    with pytest.warns(UserWarning, match=r"1 files of .* cannot be decoded as images"):
        features, keys = ssl_pipeline.embed(finished.backbone, source, workers=0)
    assert sorted(keys) == [f"{('cat', 'dog')[number % 2]}/{number}.png" for number in (0, 2, 4, 1, 3, 5)]
    image = finished.backbone.transform()(Image.open(photos / keys[2]))
    with torch.no_grad():
        torch.testing.assert_close(features[2:3], finished.backbone(image[None]))


@pytest.mark.parametrize(("given", "column"), [("folder", "file"), ("shards", "key")])
def test_names_are_those_of_a_column_of_the_command(finished, photos, shards, tmp_path, monkeypatch, given, column):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = photos if given == "folder" else shards
    features, names = ssl_pipeline.embed(finished.backbone, source, workers=0)
    output = tmp_path / "a.npz"
    embed_command(EmbedConfig(run=finished.path, source=str(source), output=output, workers=0))
    with np.load(output, allow_pickle=False) as arrays:
        rows = dict(zip(arrays[column].tolist(), arrays["features"], strict=True))
    assert sorted(rows) == sorted(names)
    expected = torch.from_numpy(np.stack([rows[name] for name in names]))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_knn_is_what_the_command_measures(finished, photos, tmp_path):
    for part in ("train", "test"):
        make_shards(MakeShards(source=str(photos), output=tmp_path / part, shuffle_seed=len(part), workers=1))
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    accuracy = ssl_pipeline.knn(finished.backbone, train, test, k=2, workers=0)
    report = evaluate_knn(KnnConfig(run=finished.path, train=train, test=test, k=(2,), workers=0, output=tmp_path))
    assert accuracy == {name: report[name] for name in ("top1", "top5", "top1_interval")}
    alone = ssl_pipeline.knn(finished.backbone, photos, k=2, workers=0)
    one = KnnConfig(run=finished.path, train=train, test=train, k=(2,), workers=0, output=tmp_path, leave_one_out=True)
    assert alone["top1"] == json.loads(json.dumps(evaluate_knn(one)))["top1"]


def test_mistakes_of_images_are_told(finished, tmp_path):
    with pytest.raises(ssl_pipeline.ConfigError, match="nowhere"):
        ssl_pipeline.embed(finished.backbone, tmp_path / "nowhere")
    with pytest.raises(ssl_pipeline.ConfigError, match=r"k-NN needs k between 1 and .* \(47\)\. Got k=48"):
        ssl_pipeline.knn(finished.backbone, finished.shards, k=48, workers=0)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / str(number)).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / str(number) / "one.png")
    with pytest.raises(ssl_pipeline.ConfigError, match=r"needs two images of a class\. Got 3 images"):
        ssl_pipeline.knn(finished.backbone, tmp_path / "photos", k=1, workers=0)
    with pytest.raises(ssl_pipeline.ConfigError, match="device must be auto, cpu or cuda"):
        ssl_pipeline.embed(finished.backbone, finished.shards, device="tpu?")


def test_what_pretrain_cannot_begin_with_is_told():
    with pytest.raises(ssl_pipeline.ConfigError, match=r"pretrain\(\) needs images=FOLDER or shards=DIR"):
        ssl_pipeline.pretrain()
    with pytest.raises(ssl_pipeline.ConfigError, match=r"overrides must be a dict of settings .*Got list"):
        ssl_pipeline.pretrain(images="photos", overrides=["train.steps=2"])


@pytest.mark.parametrize("call", ["embed", "knn"])
def test_what_is_no_backbone_is_told_with_what_to_write(finished, call):
    function = getattr(ssl_pipeline, call)
    for given in (str(finished.path), finished.path):
        with pytest.raises(ssl_pipeline.ConfigError) as error:
            function(given, "photos")
        assert str(error.value).endswith(f"Write {call}(ssl_pipeline.load('{finished.path}'), ...).")
    with pytest.raises(ssl_pipeline.ConfigError, match=r"Got str\. ssl_pipeline\.load\(RUN\) gives one\."):
        function("photos", "photos")  # no run
    with pytest.raises(ssl_pipeline.ConfigError, match=rf"Got Run\. Write {call}\(run\.backbone, \.\.\.\)\."):
        function(finished, "photos")
    with pytest.raises(ssl_pipeline.ConfigError, match=r"Got Linear\. ssl_pipeline\.load\(RUN\) gives one\."):
        function(torch.nn.Linear(1, 1), "photos")


def test_nothing_is_left_behind(finished, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    os.mkdir(tmp_path / "temporary")  # noqa: PTH102
    ssl_pipeline.embed(finished.backbone, photos, workers=0)
    assert not list((tmp_path / "temporary").iterdir())
