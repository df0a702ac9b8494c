import json
from pathlib import Path

import pytest

from ssl_pipeline.data.bad_samples import BadSample, BadSampleLog
from ssl_pipeline.data.errors import DataError


def bad(sample: int) -> BadSample:
    return BadSample(sample, "cat/1.jpg", "a.tar", f"{sample:04d}", 512, "truncated", 99)


def test_each_bad_sample_is_one_line(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", budget=0.1, total=100)
    assert log.record([]) == 0
    assert not log.path.exists()
    assert log.record([bad(3), bad(4), bad(3)]) == 2
    assert log.record([bad(4), bad(5)]) == 3
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["sample"] for line in lines] == [3, 4, 5]
    assert lines[0] == {
        "sample": 3,
        "file": "cat/1.jpg",
        "shard": "a.tar",
        "key": "0003",
        "byte": 512,
        "reason": "truncated",
        "substitute": 99,
    }


def test_the_run_ends_above_the_budget(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", budget=0.03, total=100)
    assert log.record([bad(1), bad(2), bad(3)]) == 3
    with pytest.raises(DataError, match=r"4 of 100 images cannot be decoded, more than data.bad_sample_budget=0\.03"):
        log.record([bad(4)])


def test_a_restart_and_a_second_process_go_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    BadSampleLog(path, budget=1, total=100).record([bad(1), bad(2)])
    first, second = (BadSampleLog(path, budget=1, total=100) for _ in range(2))
    assert first.record([bad(2), bad(3)]) == 3
    assert second.record([bad(4)]) == 4
    assert len(path.read_text().splitlines()) == 4


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"sample": 1}\n{"sam')
    assert BadSampleLog(path, budget=1, total=10).record([bad(2)]) == 2
    assert json.loads(path.read_text().splitlines()[-1])["sample"] == 2


def test_a_link_in_place_of_the_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "bad_samples.jsonl").symlink_to(tmp_path / "planted")
    with pytest.raises(OSError, match="is a symbolic link"):
        BadSampleLog(tmp_path / "bad_samples.jsonl", budget=0.1, total=100).record([bad(3)])
    assert not (tmp_path / "planted").exists()
