"""What grows with the data set is measured on sets that are made up, and read like real ones."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import start_up
from benchmarks.made_up_shards import report_start_up, write_made_up_shards
from benchmarks.settings import BenchmarkConfig
from benchmarks.start_up import count_reads
from ssl_pipeline.data.decode import decode_image
from ssl_pipeline.data.shards import verification
from ssl_pipeline.data.shards.open import open_shards


def test_made_up_shards_open_like_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.made_up_shards.LINKS", 2)
    write_made_up_shards(tmp_path / "set", shards=5, samples=30)
    index = open_shards(tmp_path / "set")
    assert index.shard_counts.tolist() == [30] * 5
    assert index.class_names == ("only",)
    for sample in (0, 59, 149):
        assert decode_image(index.read(sample).image).shape == (16, 16, 3)
        assert index.read(sample).label == 0
    monkeypatch.setattr(verification, "locked", None)  # a second start finds nothing to compare
    assert len(open_shards(tmp_path / "set")) == 150


def test_a_start_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_made_up_shards(tmp_path / "set", shards=2, samples=64)
    report_start_up(str(tmp_path / "set"), str(time.monotonic()))
    row = json.loads(capsys.readouterr().out)
    assert row["seconds"] >= row["open_seconds"] > 0
    assert row["first_batch_seconds"] > 0


@pytest.mark.parametrize("world_size", [1, 8])
def test_ranks_read_their_share(tmp_path: Path, world_size: int) -> None:
    work = count_reads(tmp_path, world_size)
    assert work["samples_read"] == work["samples"]
    assert work["reads_of_ranks"] == [work["samples"] // world_size] * world_size


@pytest.mark.slow
def test_growth_is_measured_in_new_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_up, "PROCESSES", (2,))
    growth = start_up.measure_growth(BenchmarkConfig(size="tiny", rounds=1, device="cpu"))
    assert [row["shards"] for row in growth["start_up"]] == [4, 20]
    assert all(row["seconds"] > row["open_seconds"] > 0 for row in growth["start_up"])
    assert [row["samples"] for row in growth["worker_memory"]] == [2_000, 4_000]
    assert all(row["resident_megabytes"] > row["own_megabytes"] > 0 for row in growth["worker_memory"])
