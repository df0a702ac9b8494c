"""Wherever crops are cut out, and whether images stay decoded: the same stream."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, load
from ssl_pipeline.data import device_cache
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.labelled import open_labelled_stream, with_labelled
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, LabelledConfig, StreamBatch, open_stream

GROUPS = {
    "global": ViewGroup(count=2, size=8),
    "pad": ViewGroup(count=1, size=10, crop="pad", rand_augment=2, cutout=(0.5, 0.5)),
}
DEVICE, CACHE = {"crop_on": "device"}, {"cache": True}
MODES = [{"crop_on": "device"}, {"crop_on": "device", "workers": 2}, {"cache": True}, {"cache": True, "workers": 2}]


def config(batch_size: int, **settings: object) -> DataConfig:
    return DataConfig(shards="", batch_size=batch_size, block_shards=2, **{"workers": 0} | settings)


def batches(index: ShardIndex, settings: DataConfig, count: int, **where: int) -> list[StreamBatch]:
    where = {"seed": 0, "position": 0, "rank": 0, "world_size": 1} | where
    return [batch.clone() for batch in open_stream(index, GROUPS, settings, batches=count, **where)]


def assert_equal(first: StreamBatch, second: StreamBatch) -> None:
    crops, others = first.cropped(GROUPS), second.cropped(GROUPS)
    for name in GROUPS:
        assert torch.equal(crops[name], others[name])
        assert torch.equal(first.draws[name], second.draws[name])
    assert first.labels.tolist() == second.labels.tolist()
    assert first.sample_ids.tolist() == second.sample_ids.tolist()
    assert first.bad == second.bad


@pytest.mark.parametrize("mode", MODES)
def test_on_a_cpu_batches_are_those_of_workers_that_crop(shards: Path, mode: dict[str, object]) -> None:
    index = open_shards(shards)
    plain, other = batches(index, config(6), 8), batches(index, config(6, **mode), 8)
    assert all(batch.images is None for batch in plain)
    assert all(batch.images is not None and not batch.crops for batch in other)
    for first, second in zip(plain, other, strict=True):
        assert_equal(first, second)


@pytest.mark.parametrize("mode", [DEVICE, CACHE])
@pytest.mark.parametrize("world_size", [1, 2])
def test_each_epoch_has_every_sample_once(shards: Path, world_size: int, mode: dict[str, object]) -> None:
    index = open_shards(shards)
    settings = config(4 // world_size, **mode)
    where = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    seen = [
        number for at in where for batch in batches(index, settings, 5, **at) for number in batch.sample_ids.tolist()
    ]
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("mode", [DEVICE, CACHE])
def test_ranks_share_the_batch_of_one_process(shards: Path, mode: dict[str, object]) -> None:
    index = open_shards(shards)
    whole = batches(index, config(6, **mode), 4)
    for rank in (0, 1):
        for number, part in enumerate(batches(index, config(3, **mode), 4, rank=rank, world_size=2)):
            here = slice(3 * rank, 3 * rank + 3)
            assert part.sample_ids.tolist() == whole[number].sample_ids[here].tolist()
            assert torch.equal(part.cropped(GROUPS)["global"], whole[number].cropped(GROUPS)["global"][:, here])


@pytest.mark.parametrize("mode", [DEVICE, CACHE])
def test_reading_goes_on_from_a_position(shards: Path, mode: dict[str, object]) -> None:
    index = open_shards(shards)
    whole = batches(index, config(6, **mode), 8)
    for first, second in zip(whole[5:], batches(index, config(6, **mode), 3, position=30), strict=True):
        assert_equal(first, second)


@pytest.fixture
def damaged(shards: Path) -> ShardIndex:
    """The shards with the images of samples 3, 9 and 11 overwritten."""
    for name, number in (("part-000000.tar", 3), ("part-000001.tar", 9), ("part-000001.tar", 11)):
        with tarfile.open(shards / name) as archive:
            member = archive.getmember(f"{number:04d}.jpg")
        content = bytearray((shards / name).read_bytes())
        content[member.offset_data : member.offset_data + member.size] = b"?" * member.size
        (shards / name).write_bytes(content)
    return open_shards(shards)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_samples_stand_in_for_damaged_ones(damaged: ShardIndex, mode: dict[str, object]) -> None:
    plain = batches(damaged, config(10, bad_samples="substitute"), 4)
    assert sum(len(batch.bad) for batch in plain) >= 6
    for first, second in zip(plain, batches(damaged, config(10, bad_samples="substitute", **mode), 4), strict=True):
        assert_equal(first, second)


@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_image_stops_the_run_in_one_line(damaged: ShardIndex, mode: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"Cannot decode part-00000[01]\.tar, key '00(03|09|11)', byte \d+: no JPEG"):
        batches(damaged, config(10, **mode), 2)


@pytest.mark.parametrize("mode", [DEVICE, CACHE])
def test_a_labelled_stream_keeps_step(shards: Path, mode: dict[str, object]) -> None:
    index = open_shards(shards)
    made = []
    for settings in ({}, mode):
        own = config(4, labelled=LabelledConfig(shards=str(shards), batch_size=30), **settings)
        unlabelled = open_stream(index, GROUPS, own, seed=0, position=0, rank=0, world_size=1, batches=2)
        groups = {"pad": GROUPS["pad"]}
        labelled = open_labelled_stream(index, groups, own, seed=0, step=0, rank=0, world_size=1, accumulate=1)
        made.append([batch.clone() for batch in with_labelled(unlabelled, labelled)])
    for first, second in zip(*made, strict=True):
        assert_equal(first, second)
        assert first.labelled.sample_ids.tolist() == second.labelled.sample_ids.tolist()
        assert torch.equal(first.labelled.cropped(GROUPS)["pad"], second.labelled.cropped(GROUPS)["pad"])
        assert second.to("meta").labelled.images.pixels.is_meta


def test_a_cache_is_filled_once_and_not_before_it_is_needed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, decode_all = list[int](), device_cache.decode_all
    monkeypatch.setattr(
        device_cache, "decode_all", lambda *images, **options: calls.append(1) or decode_all(*images, **options)
    )
    index = open_shards(shards)
    assert batches(index, config(6, cache=True), 0) == []
    assert calls == []
    assert len(batches(index, config(6, cache=True), 8)) == 8
    assert calls == [1]


def test_what_is_kept_of_a_cache_are_the_images_of_the_batch(shards: Path) -> None:
    index = open_shards(shards)
    where = {"seed": 0, "position": 0, "rank": 0, "world_size": 1}
    batch = next(open_stream(index, GROUPS, config(4, **CACHE), **where))
    kept = batch.clone()
    assert len(batch.images.pixels) > len(index) * 12 * 10 * 3
    assert len(kept.images.pixels) == 4 * 12 * 10 * 3
    assert_equal(kept, batch)


def test_keepalives_come_while_a_cache_fills(shards: Path) -> None:
    index, signs = open_shards(shards), list[int]()
    settings = config(4, labelled=LabelledConfig(shards=str(shards), batch_size=3), **CACHE)
    life = {"keepalive": lambda: signs.append(1)}
    stream = open_stream(index, GROUPS, settings, seed=0, position=0, rank=0, world_size=1, **life)
    labelled = open_labelled_stream(index, GROUPS, settings, seed=0, step=0, rank=0, world_size=1, accumulate=1, **life)
    for filled, batches in enumerate((stream, labelled), start=1):
        next(batches), next(batches)
        assert len(signs) == filled


def test_auto_crops_on_a_gpu_and_in_the_workers_of_a_cpu(shards: Path) -> None:
    index = open_shards(shards)
    where = {"seed": 0, "position": 0, "rank": 0, "world_size": 1}
    for device, decoded in (("cpu", False), ("cuda", True), (torch.device("cuda", 0), True)):
        batch = next(open_stream(index, GROUPS, config(4), device=device, **where))
        assert (batch.images is not None) == decoded
    batch = next(open_stream(index, GROUPS, config(4, crop_on="worker"), device="cuda", **where))
    assert batch.images is None


def test_a_cache_and_workers_that_crop_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match=r"cache keeps decoded images on the device, which then crops them"):
        config(4, cache=True, crop_on="worker")


@pytest.mark.parametrize("name", ["dino_vits16", "cifar10_simclr_resnet18", "cifar10_fixmatch_wrn28_2"])
def test_recipes_take_the_keys(name: str) -> None:
    settings = load(PretrainConfig, [f"recipe={name}", "data.crop_on=device"], command="pretrain", recipes=RECIPES)
    assert (settings.data.crop_on, settings.data.cache) == ("device", False)
    settings = load(PretrainConfig, [f"recipe={name}", "data.cache=true"], command="pretrain", recipes=RECIPES)
    assert (settings.data.crop_on, settings.data.cache) == ("auto", True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [DEVICE, CACHE])
def test_a_gpu_makes_the_crops_of_a_cpu_before_rounding(
    tmp_path: Path, write_tar: Callable, encoded: Callable, mode: dict[str, object]
) -> None:
    write_tar(tmp_path / "a.tar", {f"{n}.jpg": encoded(n, size=(40, 50)) for n in range(8)})
    index = open_shards(tmp_path)
    where = {"seed": 0, "position": 0, "rank": 0, "world_size": 1, "batches": 2}
    made = [batch.clone() for batch in open_stream(index, GROUPS, config(4, **mode), device="cuda", **where)]
    for first, second in zip(made, batches(index, config(4), 2), strict=True):
        crops = first.to("cuda", non_blocking=True).cropped(GROUPS)
        for name, expected in second.cropped(GROUPS).items():
            assert crops[name].is_cuda
            assert (crops[name].cpu() - expected).abs().mean() < 1.0
