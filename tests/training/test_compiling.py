"""What train.compile means where a run computes, and batches on their way to it."""

from __future__ import annotations

from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.training import compiling
from ssl_pipeline.training.compiling import compile_decision, compile_part, past_half_written
from ssl_pipeline.training.copying import Copies
from tests.runs import make_run
from tests.tiny import VIT, write_shards
from tests.training.test_step import batches

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    compiling._failure_on.cache_clear()
    yield
    compiling._failure_on.cache_clear()


class Layer(nn.Linear):
    """With a forward pass of its own: older torch compiles none of torch's."""

    def forward(self, images):
        return nn.functional.linear(images, self.weight, self.bias)


def inductor_says(file: Path) -> RuntimeError:
    return RuntimeError(f"ImportError: {file}: file too short\n\nSet TORCHDYNAMO_VERBOSE=1 for more")


def compiling_to(monkeypatch: pytest.MonkeyPatch, *files: Path) -> nn.Linear:
    """A compiled layer of which torch's cache has these files, cut short, until they are removed."""

    def backend(graph, inputs):
        for file in files:
            if file.exists():
                raise inductor_says(file)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    part = Layer(3, 2)
    compile_part(part)
    return part


@pytest.mark.parametrize("place", ["torchinductor_me/ab", "mine"])
def test_what_a_killed_start_has_left_of_a_library_is_made_anew(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    files = [tmp_path / place / name for name in ("main.so", "second.so")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    part = compiling_to(monkeypatch, *files)
    images = torch.ones(1, 3)
    torch.testing.assert_close(part(images), nn.functional.linear(images, part.weight, part.bias))
    assert not any(file.exists() for file in files)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in torch.compile's cache was cut short")[0] for line in lines] == list(map(str, files))


def test_a_library_of_others_stays_and_the_error_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    other = tmp_path / "libother.so"
    other.write_bytes(b"half")
    part = compiling_to(monkeypatch, other)
    with pytest.raises(Exception, match="file too short"):
        part(torch.ones(1, 3))
    assert other.exists()


def test_compiled_parts_of_a_compiled_network_are_traced_through():
    network = create_backbone(VIT)
    graphs = []
    network.compile(dynamic=False, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for part in network.modules():
        if part is not network and part._compiled_call_impl is not None:
            part._compiled_call_impl = past_half_written(part._compiled_call_impl)
    network(torch.zeros(1, 3, 16, 16))
    assert len(graphs) == 1


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
