"""Every benchmark runs at toy size and says what it should; no time is asserted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from PIL import Image

import benchmarks.__main__ as command
from benchmarks import input as input_benchmark
from benchmarks import linear, peers, scaling
from benchmarks.__main__ import BENCHMARKS, failures, run_benchmarks
from benchmarks.hardware import describe_hardware, peak_flops
from benchmarks.images import load_images, views_of
from benchmarks.settings import BenchmarkConfig
from benchmarks.step import compare_losses
from benchmarks.step_settings import SETTINGS
from ssl_pipeline.config import ConfigError, RunError

HAS_PEERS = not peers.missing("lightly", "kornia")


def run(tmp_path: Path, *names: str, **keys: object) -> dict:
    settings = {"rounds": 1, "shortest": 0.0, "size": "tiny", "images": 1, "compile": False, "device": "cpu"}
    config = BenchmarkConfig(only=names, output=tmp_path / "out", **(settings | keys))
    results = run_benchmarks(config)
    assert failures(results) == []
    assert json.loads((config.output / "results.json").read_text()) == json.loads(json.dumps(results))
    for comparison in results["comparisons"]:
        assert len(comparison["contestants"]) >= 2
        for figures in comparison["contestants"].values():
            assert figures["items_per_second"] > 0
            assert len(figures["rounds"]) == 1
    return {comparison["name"]: comparison for comparison in results["comparisons"]}


def contestants(comparison: dict) -> set[str]:
    return set(comparison["contestants"])


def test_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(input_benchmark, "RECIPES", {name: input_benchmark.RECIPES[name] for name in ("dino", "mae")})
    monkeypatch.setattr(input_benchmark, "SMALL_IMAGES", 1)
    compared = run(tmp_path, "input")
    assert set(compared) == {"input dino", "input mae"}
    for comparison in compared.values():
        assert comparison["threads"] == 1
        expected = {"official", "ours, crops", "ours, all on the CPU", "decode and drop"}
        assert expected | ({"lightly", "kornia"} if HAS_PEERS else set()) <= contestants(comparison)
        assert comparison["contestants"]["official"]["times_as_fast_as"]["official"]["median"] == 1.0


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.end_to_end.RECIPES", {"mae": "mae_vitb16"})
    comparison = run(tmp_path, "end_to_end", workers=1)["end to end mae"]
    assert {"official", "webdataset", "ours, crops", "decode and drop"} <= contestants(comparison)
    assert all("cpu_seconds_per_item" in figures for figures in comparison["contestants"].values())


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling, "START", "fork")  # nothing to import again
    monkeypatch.setattr(scaling, "num_cores", lambda: 2)
    monkeypatch.setattr(scaling, "PLACES", ("device",))
    compared = run(tmp_path, "scaling", workers=1)
    assert contestants(compared["scaling workers, decode only"]) == {"workers=1", "workers=2"}
    assert contestants(compared["scaling processes, decode only"]) == {"processes=1", "processes=2"}
    for comparison, smallest in zip(compared.values(), ("workers=1", "processes=1"), strict=True):
        assert all(list(figures["times_as_fast_as"]) == [smallest] for figures in comparison["contestants"].values())


def test_linear(tmp_path: Path):
    comparison = run(tmp_path, "linear")["linear"]
    assert contestants(comparison) == {
        "extraction", "extraction and sweep, 2 classes", "sweep, 2 classes", "one by one, 2 classes"
    }  # fmt: skip
    assert "the same heads" in comparison["contestants"]["one by one, 2 classes"]["note"]


def test_other_heads_are_refused(monkeypatch: pytest.MonkeyPatch):
    features = torch.rand(12, 8, generator=torch.Generator().manual_seed(0))
    probe = linear.Probe(torch.arange(12) % 2, 2, epochs=3, device=torch.device("cpu"))
    assert "the same heads" in probe.agree(features)
    monkeypatch.setattr(linear, "SAME", -1.0)
    with pytest.raises(ValueError, match="not the same work"):
        probe.agree(features)


def test_photometric(tmp_path: Path):
    comparison = run(tmp_path, "photometric")["photometric"]
    assert {"torchvision v2", "ours"} <= contestants(comparison)
    assert "ours, compiled" in comparison["left_out"]


def test_steps(tmp_path: Path):
    compared = run(tmp_path, "step", precision="no")
    assert set(compared) == {"step dino", "step mae", "step simclr", "step moco"}
    for comparison in compared.values():
        assert "ours, eager" in contestants(comparison)
        assert comparison["contestants"]["ours, eager"]["flops_per_item"] > 0
        assert comparison["left_out"]["ours, compiled"] == "compile=true measures it"
    for name in ("step dino", "step mae", "step moco"):
        assert "the same as ours" in compared[name]["contestants"]["official"]["note"]


def test_steps_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SETTINGS, "tiny", SETTINGS["tiny"][:1])
    comparison = run(tmp_path, "step", precision="bf16")["step dino"]
    assert "bf16 autocast" in comparison["setting"]
    assert "the same as ours" in comparison["contestants"]["official"]["note"]  # losses are compared in float32


def test_parts(tmp_path: Path):
    compared = run(tmp_path, "ema", "head", "nt_xent", "knn")
    assert set(compared) == {"ema", "head", "nt_xent", "knn"}
    assert "the same as ours" in compared["head"]["contestants"]["official"]["note"]


def test_sizes_have_the_same_methods():
    methods = {size: {setting.name for setting in settings} for size, settings in SETTINGS.items()}
    assert methods["tiny"] == methods["small"] == methods["large"] == {"dino", "mae", "simclr", "moco"}


def test_another_loss_needs_a_reason():
    assert "the same as ours" in compare_losses(2.00001, 2.0, "")
    assert "other masks" in compare_losses(2.1, 2.0, "other masks")
    with pytest.raises(ValueError, match="do not do the same work"):
        compare_losses(2.1, 2.0, "")


def test_a_missing_package_is_one_line_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    comparison = run(tmp_path, "ema")["ema"]
    assert comparison["left_out"] == {"lightly": peers.INSTALL}
    assert contestants(comparison) == {"official", "ours"}


def test_a_benchmark_that_breaks_leaves_the_others_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(config: BenchmarkConfig) -> list:
        raise AssertionError("the two do not agree")

    monkeypatch.setitem(BENCHMARKS, "head", broken)
    config = BenchmarkConfig(only=("ema", "head"), rounds=1, size="tiny", device="cpu", output=tmp_path, shortest=0.0)
    results = run_benchmarks(config)
    assert failures(results) == ["head: head: AssertionError: the two do not agree"]
    assert results["comparisons"][0]["contestants"]


def test_what_failed_is_the_exit_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = {"comparisons": [{"name": "ema", "failed": {"lightly": "TypeError: no"}}]}
    monkeypatch.setattr(command, "run_benchmarks", lambda config: results)
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
    with pytest.raises(ConfigError, match=r"'.*nowhere' does not exist"):
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
    hardware = describe_hardware(torch.device("cpu"))
    assert hardware["cpu"]
    assert hardware["cores"] >= 1
    assert hardware["versions"]["torch"]
    assert peak_flops(torch.device("cpu"), None) is None
    assert peak_flops(torch.device("cpu"), 2.0) == 2e12
