"""make gpu-check: every check has its turn and its time, and figures become advice."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import checks
from benchmarks.gpu_check.advice import advice
from benchmarks.gpu_check.checks import CHECKS
from benchmarks.gpu_check.processes import CheckError, TookTooLongError, rows_of, run_python
from benchmarks.gpu_check.settings import Check, Found, GpuCheckConfig, Place
from benchmarks.gpu_check.step_report import setting_of
from benchmarks.settings import settings_of
from ssl_pipeline.config import RunError


def place(folder: Path, seconds: float = 60.0) -> Place:
    return Place(GpuCheckConfig(output=folder, size="tiny"), folder, time.monotonic() + seconds)


def test_the_order_is_the_one_of_the_page():
    assert [check.name for check in CHECKS] == list(GpuCheckConfig.model_fields["only"].annotation.__args__[0].__args__)


def test_whatever_one_check_does_the_others_have_their_turn(tmp_path, monkeypatch, capsys):
    def breaks(place: Place) -> Found:
        raise ValueError("no such kernel")

    def fails(place: Place) -> Found:
        raise CheckError("last line (00.log)")

    def takes_long(place: Place) -> Found:
        run_python(place, "-c", "import time; time.sleep(60)")
        raise AssertionError

    def passes(place: Place) -> Found:
        return Found("passed", "3 passed", {"gain": 1.5})

    some = [
        Check("cuda_tests", "tests", 60, breaks),
        Check("pinned_ring", "ring", 60, fails),
        Check("precision", "formats", 0.5, takes_long),
        Check("compile", "compiled", 60, passes),
    ]
    monkeypatch.setattr(gpu_check, "CHECKS", some)
    found = gpu_check.run_checks(GpuCheckConfig(output=tmp_path, size="tiny"))
    assert [one.state for one in found.values()] == ["failed", "failed", "too long", "passed"]
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [line["state"] for line in report["checks"]] == ["failed", "failed", "too long", "passed"]
    assert report["checks"][3]["gain"] == 1.5
    assert report["size"] == "tiny"
    printed = capsys.readouterr().out
    assert "ValueError: no such kernel" in printed
    assert "not done in 0 s" in printed
    only = gpu_check.run_checks(GpuCheckConfig(output=tmp_path, size="tiny", only=("compile",), minutes=1e-9))
    assert {name: one.state for name, one in only.items()} == {"compile": "no time"}


@pytest.mark.parametrize("state", ["failed", "too long", "no time"])
def test_what_has_not_passed_is_told_by_the_exit_code(tmp_path, monkeypatch, state):
    found = {"compile": Found("passed", ""), "precision": Found("skipped", ""), "fsdp": Found(state, "")}
    monkeypatch.setattr(gpu_check, "run_checks", lambda config: found)
    with pytest.raises(RunError, match=rf"Not passed: fsdp \({state}\)\."):
        gpu_check.main(GpuCheckConfig(output=tmp_path, size="tiny"))
    del found["fsdp"]
    gpu_check.main(GpuCheckConfig(output=tmp_path, size="tiny"))


@pytest.mark.parametrize(("last", "state"), [(34.0, "failed"), (60.0, "passed")])
def test_a_run_that_learns_nothing_has_not_passed(tmp_path, monkeypatch, last, state):
    def pretrain(place: Place, name: str, *settings: str) -> list[dict[str, float]]:
        rows = [{"epoch": 0.0, "knn_top1": 30.0}, {"epoch": 3.0, "knn_top1": last}]
        return rows if name == "run" else [{"images_per_second": 1e5}]

    for part in ("train", "test"):
        (tmp_path / "cifar10" / part).mkdir(parents=True)
    config = GpuCheckConfig(output=tmp_path, size="large", cifar10=tmp_path / "cifar10")
    monkeypatch.setattr(checks, "pretrain", pretrain)
    found = checks.cifar10(Place(config, tmp_path / "run", time.monotonic() + 60))
    assert found.state == state
    assert f"k-NN {last} %" in found.said


def test_a_process_ends_with_its_time_and_with_its_children(tmp_path):
    code = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    began = time.monotonic()
    with pytest.raises(TookTooLongError):
        run_python(place(tmp_path, seconds=1.0), "-c", code)
    assert time.monotonic() - began < 20


def test_the_last_line_says_why_a_command_failed(tmp_path):
    with pytest.raises(CheckError, match=r"^error: there is no GPU \(.*00.log\)$"):
        run_python(place(tmp_path), "-c", "print('working'); raise SystemExit('error: there is no GPU')")


def test_a_row_that_is_being_written_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert rows_of(tmp_path) == [{"step": 1, "loss": 2.0}]


def of_a_step(worker: float, device: float, beside: float, *, wait: float, mfu: float, peak: float) -> Found:
    runs = {
        name: {"images_per_second": rate, "data_wait": wait}
        for name, rate in (("worker", worker), ("device", device), ("device, copy_stream", beside))
    }
    return Found("passed", "", {"runs": runs, "step": {"mfu": mfu, "peak_gb": peak}})


def test_advice_names_what_is_faster():
    found = {
        "compile": Found("passed", "", {"gain": 1.34}),
        "dino_vits16": of_a_step(1200, 1000, 1100, wait=0.3, mfu=0.2, peak=10),
    }
    assert advice(found, gpu_bytes=80 * 10**9, tiny=False) == [
        "train.compile=auto should be the default: a step is 1.34 times as fast.",
        "data.crop_on=auto should mean worker for dino_vits16: 1.20 times the images per second.",
        "train.copy_stream should be true for dino_vits16: 1.10 times the images per second.",
        "dino_vits16 waits 30% of the time for images: more data.workers, or make_shards short_side=320.",
        "dino_vits16 reaches 20% of the GPU's peak: try a larger data.batch_size, and train.compile=auto.",
        "dino_vits16 takes 10 of 80 GB: data.batch_size has room to grow.",
    ]
    assert advice(found, gpu_bytes=None, tiny=True) == []


def test_where_the_defaults_are_right_nothing_is_advised():
    found = {
        "compile": Found("passed", "", {"gain": 1.05}),
        "dino_vits16": of_a_step(1000, 1000, 1010, wait=0.02, mfu=0.4, peak=60),
        "fsdp": Found("failed", "loss differs by 0.3"),
    }
    assert advice(found, gpu_bytes=80 * 10**9, tiny=False) == [
        "fsdp failed: loss differs by 0.3. Mend that first.",
        "train.compile may stay false: a step is 1.05 times as fast.",
    ]


@pytest.mark.slow
def test_without_a_gpu_the_checks_run_in_tiny_sizes(tmp_path, capsys):
    config = GpuCheckConfig(
        output=tmp_path,
        size="tiny",
        patience=10,
        minutes=60,
        only=("pinned_ring", "kill_and_resume", "fsdp", "dinov2_vits14"),
    )
    found = gpu_check.run_checks(config)
    assert {name: one.state for name, one in found.items()} == dict.fromkeys(config.only, "passed")
    assert "on the CPU" in found["pinned_ring"].said
    assert found["kill_and_resume"].figures["loss_gap"] == 0
    assert found["fsdp"].figures["loss_gap"] == 0
    assert found["fsdp"].figures["shared"]["sharded"]
    assert found["kill_and_resume"].figures["killed_after_step"] < 20


def test_fsdp_waits_for_a_torch_that_shards_rightly(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "torch_is_too_old", lambda: True)
    found = checks.fsdp(place(tmp_path))
    assert (found.state, found.said.split(",")[0]) == ("skipped", "needs torch 2.11")


@pytest.mark.parametrize("recipe", ["dino_vits16", "dinov2_vits14", "dinov2_vitl16_short"])
def test_a_measured_step_has_the_network_and_the_views_of_its_recipe(recipe):
    setting, optim = setting_of(recipe, batch=None, tiny=False)
    assert setting.views["global"] == (2, 224)
    assert setting.views["local"][0] == 8
    assert setting.batch_size == settings_of(recipe).data.batch_size
    assert optim == settings_of(recipe).optim
    small, _ = setting_of(recipe, batch=None, tiny=True)
    assert small.method.name == setting.method.name
