import json
import time
from pathlib import Path

import pytest

from benchmarks.cost_growth import _growth, _work_of_ranks, report_start_up
from benchmarks.synthetic_shards import write_synthetic_shards
from ssl_pipeline.data.decode import decode_image
from ssl_pipeline.data.shards import verification
from ssl_pipeline.data.shards.open import open_shards


def test_made_up_shards_open_like_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.synthetic_shards.LINKS", 2)
    write_synthetic_shards(tmp_path / "set", shards=5, samples=30)
    index = open_shards(tmp_path / "set")
    assert index.shard_counts.tolist() == [30] * 5
    assert index.class_names == ("only",)
    for sample in (0, 59, 149):
        assert decode_image(index.read(sample).image).shape == (16, 16, 3)
        assert index.read(sample).label == 0
    monkeypatch.setattr(verification, "locked", None)  # a second start finds nothing to compare
    assert len(open_shards(tmp_path / "set")) == 150


def test_a_start_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_synthetic_shards(tmp_path / "set", shards=2, samples=64)
    report_start_up(str(tmp_path / "set"), str(time.monotonic()))
    row = json.loads(capsys.readouterr().out)
    assert row["seconds"] >= row["open_seconds"] > 0
    assert row["first_batch_seconds"] > 0


@pytest.mark.parametrize("world_size", [1, 8])
def test_ranks_read_their_share(tmp_path: Path, world_size: int) -> None:
    work = _work_of_ranks(tmp_path, world_size)
    assert work["samples_read"] == work["samples"]
    assert work["reads_of_ranks"] == [work["samples"] // world_size] * world_size


def test_growth_is_last_over_first() -> None:
    assert _growth([{"seconds": 2.0}, {"seconds": 9.0}, {"seconds": 3.0}], "seconds") == 1.5
