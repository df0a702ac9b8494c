"""Masks come with their views: the same whatever reads, crops and shares the images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.batches import StreamBatch, make_batch
from ssl_pipeline.data.labelled import open_labelled_stream
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, LabelledConfig, open_stream

GROUPS = {"global": ViewGroup(count=2, size=32), "image": ViewGroup(size=16), "local": ViewGroup(count=3, size=8)}
MASKS = {
    "global": MaskRule("blocks", 4, ratio=(0.1, 0.5), probability=0.5, stratified=True),
    "image": MaskRule("random", 4, ratio=(0.2, 0.8), probability=0.8),
}
MODES = [
    {},
    {"workers": 2},
    {"crop_on": "device"},
    {"crop_on": "device", "workers": 2},
    {"cache": True},
]


def config(batch_size: int, **settings: object) -> DataConfig:
    return DataConfig(shards="", batch_size=batch_size, block_shards=2, **{"workers": 0} | settings)


def batches(index: ShardIndex, settings: DataConfig, count: int, **options: object) -> list[StreamBatch]:
    options = {"seed": 0, "position": 0, "rank": 0, "world_size": 1, "masks": MASKS} | options
    return [batch.clone() for batch in open_stream(index, GROUPS, settings, batches=count, **options)]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def joined(parts: list[StreamBatch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part.masks[name] for part in parts], dim=1) for name in MASKS}


def test_a_batch_has_the_masks_of_its_views(shards: Path) -> None:
    (images,) = batches(open_shards(shards), config(10), 1)
    batch = make_batch(images.to("cpu"), GROUPS, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert batch.masks.keys() == MASKS.keys()
    assert batch.masks["global"].shape == (2, 10, 64)
    assert batch.masks["image"].shape == (1, 10, 16)
    assert batch.masks["image"].dtype == torch.bool
    assert batch.masks["global"].any(dim=-1).sum() == 10  # half of all global views
    assert images.to("meta").masks["image"].is_meta
    for name in MASKS:
        places = batch.masked[name]
        assert torch.equal(places, batch.masks[name].flatten().nonzero().flatten())
        assert images.to("meta").masked[name].shape == places.shape  # found while the masks are on the host
        assert torch.equal(images.to("cpu").clone().masked[name], places)
        assert batch.masked_patches(name) is places
        assert torch.equal(replace(batch, masked={}).masked_patches(name), places)


@pytest.mark.parametrize("mode", MODES[1:])
def test_masks_do_not_depend_on_who_reads_and_crops(shards: Path, mode: dict[str, object]) -> None:
    index = open_shards(shards)
    plain, other = batches(index, config(6), 5), batches(index, config(6, **mode), 5)
    assert all(equal(first.masks, second.masks) for first, second in zip(plain, other, strict=True))
    assert not equal(plain[0].masks, plain[1].masks)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_share_the_masks_of_one(shards: Path, mode: dict[str, object]) -> None:
    index = open_shards(shards)
    shares = [batches(index, config(6, **mode), 3, rank=rank, world_size=2) for rank in (0, 1)]
    for whole, *parts in zip(batches(index, config(12), 3), *shares, strict=True):
        assert equal(whole.masks, joined(parts))


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_micro_batches_have_the_masks_of_one_big_batch(shards: Path, mode: dict[str, object]) -> None:
    index = open_shards(shards)
    parts = batches(index, config(4, **mode), 6, accumulate=3)
    for step, whole in enumerate(batches(index, config(12), 2)):
        assert equal(whole.masks, joined(parts[3 * step : 3 * step + 3]))


def test_a_resumed_stream_has_the_masks_that_it_would_have_had(shards: Path) -> None:
    index = open_shards(shards)
    whole = batches(index, config(4), 8, accumulate=2, position=5)  # after a change of the batch size
    later = batches(index, config(4), 4, accumulate=2, position=5 + 16)
    assert all(equal(first.masks, second.masks) for first, second in zip(whole[4:], later, strict=True))


def test_large_images_that_are_decoded_few_at_a_time_keep_their_masks(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_shards(shards)
    whole = batches(index, config(9), 2)
    monkeypatch.setattr("ssl_pipeline.data.crop_reader.CHUNK_BYTES", 900)  # two or three images of 360
    assert all(
        equal(first.masks, second.masks) for first, second in zip(whole, batches(index, config(9), 2), strict=True)
    )


def test_masks_change_no_view(shards: Path) -> None:
    index = open_shards(shards)
    with_masks, without = batches(index, config(6), 2), batches(index, config(6), 2, masks={})
    for first, second in zip(with_masks, without, strict=True):
        assert equal(first.cropped(GROUPS), second.cropped(GROUPS))
        assert equal(first.draws, second.draws)
        assert second.masks == {}


def test_the_seed_and_the_epoch_change_masks(shards: Path) -> None:
    index = open_shards(shards)
    first, second = batches(index, config(20), 2)
    order = torch.argsort(first.sample_ids), torch.argsort(second.sample_ids)
    assert not torch.equal(first.masks["image"][:, order[0]], second.masks["image"][:, order[1]])
    (other,) = batches(index, config(20), 1, seed=1)
    assert not torch.equal(first.masks["image"][:, order[0]], other.masks["image"][:, torch.argsort(other.sample_ids)])


def test_labelled_views_have_masks_too(shards: Path) -> None:
    index = open_shards(shards)
    settings = config(4, labelled=LabelledConfig(shards=str(shards), batch_size=6))
    rule = {"image": MASKS["image"]}
    where = {"seed": 0, "step": 3, "rank": 0, "world_size": 1, "accumulate": 2}
    stream = open_labelled_stream(index, {"image": GROUPS["image"]}, settings, masks=rule, **where)
    assert next(stream).masks["image"].shape == (1, 6, 16)


def test_views_that_do_not_consist_of_patches_are_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"^augment\.local: .* a multiple of 3 pixels\. Got 8\.$"):
        batches(open_shards(shards), config(4), 1, masks={"local": MaskRule("random", 3)})
