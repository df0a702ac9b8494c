"""Views of one of several sizes per optimizer step, and views that have the crops of another group."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.augment.draw import ViewSampler
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.batches import StreamBatch, make_batch
from ssl_pipeline.data.labelled import open_labelled_stream
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, LabelledConfig, open_stream

OFF = {"jitter_prob": 0.0, "gray_prob": 0.0}
SIZES, PAIRED = (16, 24, 32), (8, 8, 12)
GROUPS = {
    "global": ViewGroup(count=2, size=SIZES, size_weights=(0.5, 0.25, 0.25), blur_prob=0.5, cutout=(0.5, 0.5)),
    "local": ViewGroup(count=3, size=PAIRED, size_weights=(0.5, 0.25, 0.25)),
    "gram": ViewGroup(count=2, size=48, crops_of="global", **OFF),
}
MASKS = {"global": MaskRule("blocks", 4, ratio=(0.1, 0.5), probability=0.5, stratified=True)}
MODES = [{}, {"workers": 2}, {"crop_on": "device"}, {"crop_on": "device", "workers": 2}, {"cache": True}]
NORMALISED = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


def config(batch_size: int, **settings: object) -> DataConfig:
    return DataConfig(shards="", batch_size=batch_size, block_shards=2, **{"workers": 0} | settings)


def batches(index: ShardIndex, settings: DataConfig, count: int, **options: object) -> list[StreamBatch]:
    options = {"seed": 0, "position": 0, "rank": 0, "world_size": 1, "groups": GROUPS, "masks": MASKS} | options
    groups = options.pop("groups")
    return [batch.clone() for batch in open_stream(index, groups, settings, batches=count, **options)]


def size_of(batch: StreamBatch) -> int:
    return batch.cropped(GROUPS)["global"].shape[-1]


def assert_equal(first: StreamBatch, second: StreamBatch) -> None:
    crops, others = first.cropped(GROUPS), second.cropped(GROUPS)
    for name in GROUPS:
        assert torch.equal(crops[name], others[name])
        assert torch.equal(first.draws[name], second.draws[name])
    assert torch.equal(first.masks["global"], second.masks["global"])


def sizes_of_steps(groups: dict[str, ViewGroup], count: int) -> list[dict[str, int]]:
    sampler = ViewSampler(groups, {}, seed=1, global_batch=4, size_seed=1)
    return [sampler.sizes(range(4 * step, 4 * step + 4)) for step in range(count)]


def test_each_step_has_one_of_the_sizes_as_often_as_its_weight_says() -> None:
    made = sizes_of_steps(GROUPS, 2_000)
    drawn = [sizes["global"] for sizes in made]
    for size, weight in zip(SIZES, (0.5, 0.25, 0.25), strict=True):
        assert abs(drawn.count(size) / 2_000 - weight) < 0.04
    # groups with the same weights change together
    assert {(sizes["global"], sizes["local"]) for sizes in made} == {(16, 8), (24, 8), (32, 12)}
    assert {sizes["gram"] for sizes in made} == {48}


def test_without_weights_all_sizes_are_equally_likely() -> None:
    drawn = [sizes["view"] for sizes in sizes_of_steps({"view": ViewGroup(size=(4, 8))}, 2_000)]
    assert abs(drawn.count(4) / 2_000 - 0.5) < 0.04
    never = ViewGroup(size=(4, 8), size_weights=(0.0, 1.0))
    assert {sizes["view"] for sizes in sizes_of_steps({"view": never}, 50)} == {8}


@pytest.mark.parametrize("mode", MODES[1:])
def test_sizes_do_not_depend_on_who_reads_and_crops(shards: Path, mode: dict[str, object]) -> None:
    index = open_shards(shards)
    plain, other = batches(index, config(6), 8), batches(index, config(6, **mode), 8)
    assert {size_of(batch) for batch in plain} == set(SIZES)
    for first, second in zip(plain, other, strict=True):
        assert_equal(first, second)


def test_all_processes_and_micro_batches_of_a_step_have_one_size(shards: Path) -> None:
    index = open_shards(shards)
    whole = batches(index, config(12), 6)
    parts = [batches(index, config(3), 12, rank=rank, world_size=2, accumulate=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        shares = [parts[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)]
        for name, crops in batch.cropped(GROUPS).items():
            assert torch.equal(crops, torch.cat([share.cropped(GROUPS)[name] for share in shares], dim=1))
        assert torch.equal(batch.masks["global"], torch.cat([share.masks["global"] for share in shares], dim=1))


def test_a_resumed_stream_has_the_sizes_that_it_would_have_had(shards: Path) -> None:
    index = open_shards(shards)
    whole = batches(index, config(4), 12, accumulate=2, position=3)  # after a change of the batch size
    for first, second in zip(whole[6:], batches(index, config(4), 6, accumulate=2, position=3 + 24), strict=True):
        assert_equal(first, second)


def test_views_masks_and_operations_follow_the_size_of_the_step(shards: Path) -> None:
    for images in batches(open_shards(shards), config(4), 8):
        size = size_of(images)
        batch = make_batch(images, GROUPS, **NORMALISED)
        assert batch.views["global"].shape == (2, 4, 3, size, size)
        assert batch.masks["global"].shape == (2, 4, (size // 4) ** 2)
        top, left, bottom, right = images.draws["global"][..., 12:].unbind(-1)
        assert bottom.max() <= size
        assert right.max() <= size
        assert ((bottom - top) * (right - left)).max() > (0.2 * size) ** 2


def test_labelled_and_unlabelled_images_of_a_step_have_one_size(shards: Path) -> None:
    index, groups = open_shards(shards), {"view": ViewGroup(size=(4, 8, 12))}
    settings = config(4, labelled=LabelledConfig(shards=str(shards), batch_size=3))
    where = {"seed": 5, "rank": 0, "world_size": 1, "accumulate": 1}
    unlabelled = batches(index, config(4), 10, position=8, groups=groups, masks={}, **where)
    labelled = open_labelled_stream(index, groups, settings, step=2, **where)
    sizes = [(batch.crops["view"].shape[-1], next(labelled).crops["view"].shape[-1]) for batch in unlabelled]
    assert all(first == second for first, second in sizes)
    assert len(set(sizes)) == 3


# crops of another group


def with_group(**settings: object) -> dict[str, ViewGroup]:
    return {"image": ViewGroup(count=2, size=16, blur_prob=0.5), "token": ViewGroup(**{"count": 2, **settings})}


@pytest.mark.parametrize("mode", MODES)
def test_boxes_and_flips_are_those_of_the_other_group(shards: Path, mode: dict[str, object]) -> None:
    index, groups = open_shards(shards), with_group(size=8, crops_of="image", **OFF)
    plain = {"image": groups["image"], "other": ViewGroup(count=2, size=8)}
    for images, without in zip(
        batches(index, config(6, **mode), 3, groups=groups, masks={}),
        batches(index, config(6, crop_on="device"), 3, groups=plain, masks={}),
        strict=True,
    ):
        crops = images.cropped(groups)
        assert torch.equal(crops["image"], without.cropped(plain)["image"])  # which the second group leaves alone
        boxes = without.images.boxes["image"], without.images.flips["image"]
        without.images.boxes["other"], without.images.flips["other"] = boxes  # type: ignore[index]
        assert torch.equal(crops["token"], without.cropped(plain)["other"])


def test_an_operation_that_both_have_draws_the_same_for_both(shards: Path) -> None:
    index = open_shards(shards)
    (images,) = batches(index, config(6), 1, groups=(groups := with_group(size=16, crops_of="image")), masks={})
    batch = make_batch(images, groups, **NORMALISED)
    unblurred = (images.draws["image"][..., 10] == 0) & (images.draws["token"][..., 10] == 0)
    assert 0 < unblurred.sum() < 12
    assert torch.equal(batch.views["image"][unblurred], batch.views["token"][unblurred])
    both = with_group(size=16, crops_of="image", blur_prob=0.5)
    views = make_batch(batches(index, config(6), 1, groups=both, masks={})[0], both, **NORMALISED).views
    assert torch.equal(views["image"], views["token"])


def test_operations_of_a_groups_own_draw_numbers_of_its_own(shards: Path) -> None:
    groups = with_group(size=16, crops_of="image", rand_augment=2, cutout=(0.5, 0.5))
    (images,) = batches(open_shards(shards), config(20), 1, groups=groups, masks={})
    own = images.draws["token"][..., 12:]
    assert own.shape == (2, 20, 8)
    assert len(own[..., 0].unique()) > 5
    assert torch.equal(images.draws["image"][..., :9], images.draws["token"][..., :9])


def test_a_group_is_normalised_as_it_says(shards: Path) -> None:
    groups = with_group(size=8, crops_of="image", mean=(0.5,) * 3, std=(0.5,) * 3, **OFF)
    (images,) = batches(open_shards(shards), config(4), 1, groups=groups, masks={})
    batch = make_batch(images, groups, **NORMALISED)
    assert_close(batch.views["token"], images.crops["token"] / 255 * 2 - 1)
    plain = make_batch(images, {**groups, "token": with_group(size=8, crops_of="image", **OFF)["token"]}, **NORMALISED)
    assert not torch.equal(plain.views["token"], batch.views["token"])
    assert torch.equal(plain.views["image"], batch.views["image"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"crops_of": "imag"},
            "augment.token.crops_of must be another group of views that the method reads: image. Got 'imag'. "
            "Did you mean 'image'?",
        ),
        (
            {"crops_of": "token"},
            "augment.token.crops_of must be another group of views that the method reads: image. Got 'token'.",
        ),
        (
            {"crops_of": "image", "count": 1},
            "augment.token.count must equal that of augment.image, 2, whose crops it uses. Got 1.",
        ),
    ],
)
def test_crops_that_cannot_be_had_are_told(shards: Path, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        batches(open_shards(shards), config(4), 1, groups=with_group(size=8, **settings), masks={})
    assert str(caught.value) == sentence


def test_a_chain_is_refused(shards: Path) -> None:
    groups = with_group(size=8, crops_of="image") | {"third": ViewGroup(count=2, size=4, crops_of="token")}
    with pytest.raises(ConfigError) as caught:
        batches(open_shards(shards), config(4), 1, groups=groups, masks={})
    assert str(caught.value) == (
        "augment.third.crops_of must be a group with crops of its own. Got 'token', which uses those of 'image'."
    )
