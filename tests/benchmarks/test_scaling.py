"""Streams are measured in their steady state, and a world of processes as a whole."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest

from benchmarks import streams
from benchmarks.images import load_images
from benchmarks.streams import OurInput, Steady, batches_of_world, doublings
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.stream import DataConfig

GROUPS = {"view": ViewGroup(size=16)}


@pytest.fixture(autouse=True)
def fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that need not import everything again."""
    monkeypatch.setattr(streams, "START", "fork")


@pytest.fixture
def source(tmp_path: Path) -> OurInput:
    shards = load_images(None, pixels=(32, 32)).spread_out(8).write_shards(tmp_path / "shards")
    return OurInput(GROUPS, DataConfig(shards=str(shards), batch_size=2, workers=1))


def test_a_unit_is_whole_turns_of_the_workers():
    stream = count()
    steady = Steady(lambda: stream, batch_size=4, turn=3, seconds=0.0)
    with steady.opened():
        assert steady.draw() == 3 * 4
        assert next(stream) == 3 + 3  # one turn before the measurement, one in it


def test_a_stream_ends_with_its_session():
    ended = []

    def batches() -> Iterator[int]:
        try:
            yield from count()
        finally:
            ended.append(True)

    steady = Steady(batches, batch_size=1, turn=1, seconds=0.0)
    with steady.opened():
        assert not ended
    assert ended


def test_settings_double_up_to_the_most():
    assert doublings(1) == [1]
    assert doublings(2) == [1, 2]
    assert doublings(12) == [1, 2, 4, 8]


def test_the_batches_of_all_ranks_are_counted(source: OurInput):
    world = batches_of_world(source, 2)
    assert len(list(islice(world, 10))) == 10


def test_the_ranks_end_with_the_measurement(source: OurInput, monkeypatch: pytest.MonkeyPatch):
    world = batches_of_world(source, 2)
    next(world)
    ranks = multiprocessing.active_children()
    assert len(ranks) == 2
    world.close()
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_a_rank_that_fails_is_an_error(source: OurInput, capfd: pytest.CaptureFixture):
    settings = source.settings.model_copy(update={"batch_size": 5})  # two ranks would need 10 images of 8
    with pytest.raises(RuntimeError, match="its error stands above"):
        next(batches_of_world(OurInput(GROUPS, settings), 2))
    assert "is larger than the data set" in capfd.readouterr().err
