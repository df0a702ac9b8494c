"""Every benchmark runs at toy size and says what it should; no time is asserted."""

from __future__ import annotations

import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from PIL import Image

import benchmarks.__main__ as command
from benchmarks import evaluation, rounds, streams
from benchmarks import input as input_benchmark
from benchmarks import step as step_benchmark
from benchmarks.__main__ import BENCHMARKS, run_benchmarks
from benchmarks.images import load_images, views_of
from benchmarks.lightly_steps import dino_loss
from benchmarks.settings import BenchmarkConfig
from benchmarks.step import SETTINGS, Steps, compare_losses
from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.config import RECIPES, ConfigError, RunError, read_recipe, validate
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.methods import build_method

METHODS = {"dino", "mae", "simclr", "moco", "swav", "ibot", "dinov2"}
PEERS = {name for name in ("lightly", "kornia") if find_spec(name)}


def run(tmp_path: Path, *names: str, **keys: object) -> dict:
    settings = {"rounds": 1, "shortest": 0.0, "size": "tiny", "images": 1, "compile": False, "device": "cpu"}
    config = BenchmarkConfig(only=names, output=tmp_path / "out", **(settings | keys))
    assert run_benchmarks(config) == []
    results = json.loads((config.output / "results.json").read_text())
    for comparison in results["comparisons"]:
        assert len(comparison["contestants"]) >= 2
        for figures in comparison["contestants"].values():
            (sample,) = figures["rounds"]
            assert sample["items"] > 0
            assert sample["seconds"] > 0
    return {comparison["name"]: comparison for comparison in results["comparisons"]}


def contestants(comparison: dict) -> set[str]:
    return set(comparison["contestants"])


@pytest.mark.slow
def test_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(input_benchmark, "RECIPES", {name: input_benchmark.RECIPES[name] for name in ("dino", "mae")})
    monkeypatch.setattr(input_benchmark, "SMALL_IMAGES", 1)
    compared = run(tmp_path, "input")
    assert set(compared) == {"input dino", "input mae"}
    for comparison in compared.values():
        assert comparison["threads"] == 1
        expected = {"official", "ours, crops", "ours, all on the CPU", "decode and drop"}
        assert expected | PEERS <= contestants(comparison)
        assert set(comparison["left_out"]) == {"lightly", "kornia"} - PEERS


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(input_benchmark, "TO_THE_END", ("mae",))
    comparison = run(tmp_path, "end_to_end", workers=1)["end to end mae"]
    assert {"official", "webdataset", "ours, crops", "decode and drop"} <= contestants(comparison)


@pytest.mark.slow
def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "START", "fork")  # nothing to import again
    monkeypatch.setattr(streams, "whole_cores", lambda: 2)
    monkeypatch.setattr(streams, "PLACES", {"device": streams.PLACES["device"]})
    compared = run(tmp_path, "scaling", workers=1)
    assert contestants(compared["scaling workers, decode only"]) == {"workers=1", "workers=2"}
    assert contestants(compared["scaling processes, decode only"]) == {"processes=1", "processes=2"}
    for comparison, smallest in zip(compared.values(), ("workers=1", "processes=1"), strict=True):
        assert comparison["references"] == [smallest]


def test_linear(tmp_path: Path):
    comparison = run(tmp_path, "linear")["linear"]
    assert contestants(comparison) == {
        "extraction", "extraction and sweep, 2 classes", "sweep, 2 classes", "one by one, 2 classes"
    }  # fmt: skip
    assert "the same heads" in comparison["contestants"]["one by one, 2 classes"]["note"]


def test_other_heads_are_refused(monkeypatch: pytest.MonkeyPatch):
    features, labels = torch.rand(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    assert "the same heads" in evaluation.same_heads(features, labels)
    monkeypatch.setattr(evaluation, "SAME_HEADS", -1.0)
    with pytest.raises(ValueError, match="not the same work"):
        evaluation.same_heads(features, labels)


def test_photometric(tmp_path: Path):
    comparison = run(tmp_path, "photometric")["photometric"]
    assert {"torchvision v2", "ours"} <= contestants(comparison)
    assert "ours, compiled" in comparison["left_out"]


@pytest.mark.slow
def test_steps(tmp_path: Path):
    compared = run(tmp_path, "step", precision="no")
    assert set(compared) == {f"step {method}" for method in METHODS}
    for comparison in compared.values():
        assert "ours, eager" in contestants(comparison)
        assert comparison["contestants"]["ours, eager"]["flops_per_item"] > 0
        assert comparison["left_out"]["ours, compiled"] == "compile=true measures it"
    for name in set(compared) - {"step simclr"}:
        assert "the same as ours" in compared[name]["contestants"]["official"]["note"]


def one_step() -> Steps:
    steps = measured_steps()
    return steps.model_copy(update={"sizes": {"tiny": steps.sizes["tiny"][:1]}})


def measured_steps() -> Steps:
    return validate(Steps, read_recipe(str(SETTINGS), RECIPES))


@pytest.mark.slow
def test_steps_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_benchmark, "validate", lambda schema, tree: one_step())
    comparison = run(tmp_path, "step", precision="bf16")["step dino"]
    assert "bf16 autocast" in comparison["setting"]
    assert "the same as ours" in comparison["contestants"]["official"]["note"]  # losses are compared in float32


def test_parts(tmp_path: Path):
    compared = run(tmp_path, "ema", "head", "nt_xent", "knn")
    assert set(compared) == {"ema", "head", "nt_xent", "knn"}
    assert "the same as ours" in compared["head"]["contestants"]["official"]["note"]


def test_sizes_have_the_same_methods():
    sizes = measured_steps().sizes
    methods = {size: {setting.method.name for setting in settings} for size, settings in sizes.items()}
    assert methods["tiny"] == methods["small"] == methods["large"] == METHODS


def test_another_loss_needs_a_reason():
    assert "the same as ours" in compare_losses(2.00001, 2.0, "")
    assert "other masks" in compare_losses(2.1, 2.0, "other masks")
    with pytest.raises(ValueError, match="do not do the same work"):
        compare_losses(2.1, 2.0, "")


def test_a_missing_package_is_one_line_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rounds, "find_spec", lambda name: None)
    comparison = run(tmp_path, "ema")["ema"]
    assert comparison["left_out"] == {"lightly": rounds.INSTALL}
    assert contestants(comparison) == {"official", "ours"}


def test_a_benchmark_that_breaks_leaves_the_others_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(config: BenchmarkConfig) -> list:
        raise AssertionError("the two do not agree")

    monkeypatch.setitem(BENCHMARKS, "head", broken)
    config = BenchmarkConfig(only=("ema", "head"), rounds=1, size="tiny", device="cpu", output=tmp_path, shortest=0.0)
    assert run_benchmarks(config) == ["head: head: AssertionError: the two do not agree"]
    assert json.loads((tmp_path / "results.json").read_text())["comparisons"][0]["contestants"]


def test_what_failed_is_the_exit_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "run_benchmarks", lambda config: ["ema: lightly: TypeError: no"])
    with pytest.raises(RunError, match="ema: lightly: TypeError: no"):
        command.main(BenchmarkConfig(output=tmp_path))


def test_images_come_from_a_folder_or_a_zip(tmp_path: Path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="JPEG")
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / "photos" / f"{number}.JPEG").write_bytes(file.getvalue())
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    with ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted((tmp_path / "photos").iterdir()):
            archive.write(path, f"train/{path.name}")
    for source in ("photos", "photos.zip"):
        images = load_images(tmp_path / source, pixels=(8, 8))
        assert len(images.files) == 5
        assert len(images.spread_out(7).files) == 7
    with pytest.raises(DataError, match=r"nowhere' does not exist"):
        load_images(tmp_path / "nowhere", pixels=(8, 8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no image"):
        load_images(tmp_path / "empty", pixels=(8, 8))


def test_without_images_there_are_made_up_photographs():
    images = load_images(None, pixels=(500, 375))
    with Image.open(io.BytesIO(images.files[0])) as image:
        assert image.size == (500, 375)
    assert len(set(images.files)) == len(images.files)


def test_views_are_those_of_the_recipes():
    groups = views_of("dino_vits16")
    assert (groups["global"].count, groups["global"].size, groups["local"].count, groups["local"].size) == (
        2,
        224,
        8,
        96,
    )
    assert groups["global"].solarize_prob == (0.0, 0.2)


def test_every_benchmark_can_be_chosen():
    for name in (*BENCHMARKS, "cost_growth"):
        assert BenchmarkConfig(only=(name,)).only == (name,)


def test_the_hardware_is_named():
    config = BenchmarkConfig(device="cpu")
    hardware = config.hardware()
    assert hardware["cpu"]
    assert hardware["cores"] >= 1
    assert hardware["versions"]["torch"]
    assert config.peak_flops() is None
    assert BenchmarkConfig(device="cpu", peak_tflops=2.0).peak_flops() == 2e12


def test_losses_of_lightly_are_where_the_method_is(monkeypatch: pytest.MonkeyPatch):
    made = []
    stub = SimpleNamespace(DINOLoss=lambda **settings: made.append(settings) or torch.nn.Linear(1, 1))
    monkeypatch.setitem(sys.modules, "lightly.loss", stub)
    setting = next(one for one in measured_steps().sizes["tiny"] if one.method.name == "dino")
    method = build_method(setting.method, create_backbone(setting.backbone)).to("meta")
    assert dino_loss(method).weight.is_meta
    assert made == [{"output_dim": 64, "teacher_temp": 0.04}]
