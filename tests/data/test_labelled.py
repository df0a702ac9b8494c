"""The labelled stream: in step with the unlabelled one, and a pure function of the step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.labelled import classes_without_labels, open_labelled_stream, with_labelled
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, LabelledConfig, StreamBatch, open_stream
from ssl_pipeline.data.subset import open_subset, write_labels

GROUPS = {"weak": ViewGroup(size=8)}
UNLABELLED = {"weak": ViewGroup(size=8), "strong": ViewGroup(size=8, rand_augment=2, cutout=(0.5, 0.5))}


def config(shards: Path, *, labelled: int, **settings: object) -> DataConfig:
    return DataConfig(
        shards="",
        batch_size=4,
        labelled=LabelledConfig(shards=str(shards), batch_size=labelled),
        **{"workers": 0} | settings,
    )


def take(index: ShardIndex, settings: DataConfig, count: int, **where: int) -> list[StreamBatch]:
    where = {"seed": 0, "step": 0, "rank": 0, "world_size": 1, "accumulate": 1} | where
    stream = open_labelled_stream(index, GROUPS, settings, **where)
    return [next(stream).clone() for _ in range(count)]


def same(first: StreamBatch, second: StreamBatch) -> bool:
    return first.sample_ids.tolist() == second.sample_ids.tolist() and torch.equal(
        first.crops["weak"], second.crops["weak"]
    )


def test_batches_larger_than_the_set_repeat_it_with_new_views(shards: Path) -> None:
    index = open_shards(shards)  # 20 images
    (batch,) = take(index, config(shards, labelled=50), 1)
    numbers = batch.sample_ids.tolist()
    assert [sorted(numbers[start : start + 20]) for start in (0, 20)] == [list(range(20))] * 2
    assert sorted(set(numbers[40:])) == sorted(numbers[40:])
    assert numbers[:20] != numbers[20:40]
    assert batch.labels.tolist() == [number % 4 for number in numbers]
    again = numbers.index(numbers[0], 1)
    assert not torch.equal(batch.crops["weak"][0, 0], batch.crops["weak"][0, again])


def test_the_unlabelled_stream_still_refuses_that(shards: Path) -> None:
    index, settings = open_shards(shards), DataConfig(shards="", batch_size=21, workers=0)
    with pytest.raises(ValueError, match="larger than the data set"):
        open_stream(index, GROUPS, settings, seed=0, position=0, rank=0, world_size=1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_later_step_starts_where_an_earlier_one_would_have_come_to(shards: Path, accumulate: int) -> None:
    index, settings = open_shards(shards), config(shards, labelled=6)
    straight = take(index, settings, 8, accumulate=accumulate)
    later = take(index, settings, 2, step=3, accumulate=accumulate)
    assert all(map(same, later, straight[3 * accumulate :]))


def test_ranks_share_the_batch_of_one_process(shards: Path) -> None:
    index = open_shards(shards)
    whole = take(index, config(shards, labelled=8), 2)
    for rank in (0, 1):
        for number, part in enumerate(take(index, config(shards, labelled=4), 2, rank=rank, world_size=2)):
            here = slice(4 * rank, 4 * rank + 4)
            assert part.sample_ids.tolist() == whole[number].sample_ids[here].tolist()
            assert torch.equal(part.crops["weak"], whole[number].crops["weak"][:, here])


def test_its_order_and_views_are_not_those_of_the_unlabelled_stream(shards: Path) -> None:
    index, settings = open_shards(shards), config(shards, labelled=20)
    (labelled,) = take(index, settings, 1)
    plain = DataConfig(shards="", batch_size=20, workers=0)
    unlabelled = next(open_stream(index, GROUPS, plain, seed=0, position=0, rank=0, world_size=1))
    assert labelled.sample_ids.tolist() != unlabelled.sample_ids.tolist()
    for number in range(20):
        place = unlabelled.sample_ids.tolist().index(number)
        own = labelled.sample_ids.tolist().index(number)
        assert not torch.equal(labelled.crops["weak"][0, own], unlabelled.crops["weak"][0, place])


def test_workers_change_nothing_and_both_streams_end_together(shards: Path) -> None:
    index = open_shards(shards)
    for workers in (0, 2):
        settings = config(shards, labelled=6, workers=workers)
        stream = open_stream(index, UNLABELLED, settings, seed=0, position=0, rank=0, world_size=1, batches=3)
        labelled = open_labelled_stream(index, GROUPS, settings, seed=0, step=0, rank=0, world_size=1, accumulate=1)
        batches = [batch.clone() for batch in with_labelled(stream, labelled)]
        assert len(batches) == 3
        assert all(batch.crops.keys() == {"weak", "strong"} for batch in batches)
        parts = [batch.labelled for batch in batches]
        assert all(map(same, parts, take(index, config(shards, labelled=6), 3)))


def test_moving_a_batch_moves_its_labelled_part(shards: Path) -> None:
    index, settings = open_shards(shards), config(shards, labelled=6)
    stream = open_stream(index, UNLABELLED, settings, seed=0, position=0, rank=0, world_size=1)
    batch = next(with_labelled(stream, iter(take(index, settings, 1))))
    assert batch.labelled is not None
    assert batch.to("meta").labelled.crops["weak"].is_meta


def test_labels_are_known_without_reading_an_image(shards: Path) -> None:
    index = open_shards(shards)
    assert index.labels().tolist() == [number % 4 for number in range(20)] == [index.read(n).label for n in range(20)]


def test_classes_that_no_labelled_image_is_of_are_named(shards: Path, tmp_path: Path) -> None:
    index = open_shards(shards)  # labels 0 to 3
    assert classes_without_labels(index, 4) == []
    assert classes_without_labels(index, 6) == ["4", "5"]
    soft = np.zeros((20, 3), np.float32)
    soft[:, 0], soft[3] = 1.0, (0.7, 0.0, 0.3)
    write_labels(tmp_path / "soft.npy", index, soft, class_names=("ant", "bee", "cat"), origin=None)
    assert classes_without_labels(open_subset(shards, labels=tmp_path / "soft.npy"), 3) == ["bee"]
