"""What train.compile means where a run computes, and batches on their way to it."""

from __future__ import annotations

import _struct
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssl_pipeline.training import compiling
from ssl_pipeline.training.compiling import compile_decision, remove_half_written
from ssl_pipeline.training.copying import Copies
from tests.runs import make_run
from tests.tiny import write_shards
from tests.training.test_step import batches

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    compiling._failure_on.cache_clear()
    yield
    compiling._failure_on.cache_clear()


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A library of this Python in torch.compile's cache, written long ago."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "cache" / "ab" / "main.so"
    file.parent.mkdir(parents=True)
    shutil.copy(_struct.__file__, file)
    os.utime(file, (0, 0))
    return file


def test_whole_libraries_stay(library, capsys):
    remove_half_written()
    assert library.exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
def test_what_a_killed_start_has_left_of_a_library_is_removed(library, capsys, kept):
    whole = library.read_bytes()
    library.write_bytes(whole[: int(kept * (len(whole) - 1))])
    os.utime(library, (0, 0))
    remove_half_written()
    assert not library.exists()
    assert capsys.readouterr().out.startswith(f"{library} in torch.compile's cache was cut short")


def test_a_library_of_which_only_the_length_was_written_is_removed(library):
    library.write_bytes(bytes(library.stat().st_size))
    os.utime(library, (0, 0))
    remove_half_written()
    assert not library.exists()


def test_a_library_that_another_run_is_writing_stays(library, capsys):
    library.write_bytes(library.read_bytes()[:100])
    remove_half_written()
    assert library.exists()


def test_a_file_of_another_kind_stays(library):
    library.write_bytes(b"a script that is called .so for some reason of its own, and no library at all")
    os.utime(library, (0, 0))
    remove_half_written()
    assert library.exists()


@pytest.mark.parametrize("setting", [True, False])
def test_yes_and_no_mean_what_they_say(setting):
    assert compile_decision(setting, CPU, steps=1) == (setting, "")


def test_auto_compiles_long_runs_on_a_gpu_where_that_works(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: x)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    assert compile_decision("auto", GPU, steps=5000) == (True, "")
    assert compile_decision("auto", GPU, steps=4999) == (False, "auto compiles for 5,000 steps or more")
    assert compile_decision("auto", CPU, steps=10**6) == (False, "auto compiles only on GPUs")


def test_auto_says_what_the_compiler_lacks(monkeypatch):
    def fails(function, **_):
        raise RuntimeError("Cannot find a working triton installation.\nmore lines")

    monkeypatch.setattr(torch, "compile", fails)
    assert compile_decision("auto", GPU, steps=5000) == (
        False,
        "torch.compile fails here: RuntimeError: Cannot find a working triton installation.",
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


def batch_of(tmp_path, shards, crop_on):
    return batches(make_run(tmp_path / "run", "dino", shards, batch_size=4), crop_on=crop_on)[0]


@pytest.mark.parametrize("crop_on", ["worker", "device"])
def test_all_tensors_of_a_batch_are_known(tmp_path, shards, crop_on):
    """What is not known would be freed while the computation still reads it."""
    images = batch_of(tmp_path, shards, crop_on).to("cpu")
    known = {tensor.data_ptr() for tensor in images.tensors()}
    for part in ("draws", "masks", "crops", "masked"):
        assert {tensor.data_ptr() for tensor in getattr(images, part).values()} <= known
    assert images.labels.data_ptr() in known
    assert (images.images is None) == (crop_on == "worker")
    assert images.images is None or images.images.pixels.data_ptr() in known
    assert set(replace(images, labelled=images).tensors()) >= set(images.tensors())


def test_without_a_gpu_the_setting_changes_nothing(tmp_path, shards):
    images = batch_of(tmp_path, shards, "worker")
    moved = Copies(CPU, own_stream=True)(images)
    assert all(torch.equal(images.crops[name], moved.crops[name]) for name in images.crops)


@pytest.mark.gpu
@pytest.mark.parametrize("crop_on", ["worker", "device"])
def test_a_copy_in_its_own_stream_is_the_same_batch(tmp_path, shards, crop_on):
    images = batch_of(tmp_path, shards, crop_on)
    plain, beside = (Copies(GPU, own_stream=own)(images) for own in (False, True))
    busy = torch.ones(4096, 4096, device=GPU)
    for _ in range(20):
        busy = busy @ busy * 1e-4
    again = Copies(GPU, own_stream=True)(images)
    for one in (beside, again):
        assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), one.tensors(), strict=True))
