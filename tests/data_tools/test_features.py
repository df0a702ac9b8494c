"""The feature pass in tasks: the same features, and what is done stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from ssl_pipeline.commands.embed import EmbedConfig, embed
from ssl_pipeline.config import run_command
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data_tools import features
from ssl_pipeline.packing import engine
from tests.tiny import write_shards

MODEL = ("backbone=test_resnet", "size=16", "workers=0", "batch_size=4")


def call(shards: Path, output: Path, *arguments: str) -> np.ndarray:
    argv = [*MODEL, f"source={shards}", f"output={output}", *arguments]
    assert run_command(EmbedConfig, embed, command="embed", argv=argv) == 0
    return np.load(output, allow_pickle=False)["features"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("images") / "shards")


@pytest.mark.other
def test_tasks_of_a_shard_give_the_same_and_are_not_done_twice(shards, tmp_path, monkeypatch):
    """With a stand-in for Ray that runs the tasks here."""
    done, lost = [], [True]

    def here(function, tasks, **_):
        for number, task in enumerate(tasks):
            if lost[0] and len(done) == 2:
                raise DataError("The driver is lost.")
            done.append(task)
            yield number, function(task)

    monkeypatch.setattr(engine, "run_on_ray", here)
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    whole = call(shards, tmp_path / "whole.npz")
    output = tmp_path / "parts.npz"
    argv = [*MODEL, f"source={shards}", f"output={output}", "engine=ray"]
    assert run_command(EmbedConfig, embed, command="embed", argv=argv) != 0
    assert done == [range(0, 20), range(20, 37)]
    features._open.cache_clear()
    lost[0] = False
    np.testing.assert_array_equal(call(shards, output, "engine=ray"), whole)
    assert done == [range(0, 20), range(20, 37), range(37, 48)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["parts.npz", "whole.npz"]


def test_torchrun_and_an_engine_are_one_too_many(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "world_size", lambda: 2)
    monkeypatch.setattr(engine, "find_spec", lambda name: name)  # as where Ray is installed
    argv = [*MODEL, f"source={shards}", f"output={tmp_path / 'out.npz'}", "engine=ray"]
    assert run_command(EmbedConfig, embed, command="embed", argv=argv) != 0
    assert "engine=ray starts processes of its own. Leave torchrun out." in capsys.readouterr().err


@pytest.mark.slow
def test_features_from_ray_are_those_of_this_process(shards, tmp_path):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    settings = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=settings)
    try:
        local = call(shards, tmp_path / "local.npz")
        np.testing.assert_allclose(call(shards, tmp_path / "ray.npz", "engine=ray"), local, rtol=1e-5, atol=1e-6)
    finally:
        ray.shutdown()
