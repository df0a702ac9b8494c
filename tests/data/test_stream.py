import os
import pickle
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.augment.draw import ViewSampler
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.crop_reader import CropReader
from ssl_pipeline.data.order import Order
from ssl_pipeline.data.samples import Samples
from ssl_pipeline.data.shards.open import DataError, ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, open_stream

GROUPS = {"global": ViewGroup(count=2, size=8), "local": ViewGroup(count=3, size=4, blur_prob=0.5)}


def config(batch_size: int, **settings: object) -> DataConfig:
    return DataConfig(shards="", batch_size=batch_size, block_shards=2, **{"workers": 0} | settings)


def stream(index: ShardIndex, settings: DataConfig, **where: int) -> list[StreamBatch]:
    where = {"seed": 0, "position": 0, "rank": 0, "world_size": 1} | where
    return [batch.clone() for batch in open_stream(index, GROUPS, settings, **where)]


def read(reader: CropReader, count: int) -> StreamBatch:
    slot = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in reader.layout(range(count)).items()}
    return StreamBatch.over(slot, reader(range(count), slot))


def assert_equal(first: StreamBatch, second: StreamBatch) -> None:
    for name in GROUPS:
        assert_close(first.crops[name], second.crops[name], rtol=0, atol=0)
        assert_close(first.draws[name], second.draws[name], rtol=0, atol=0)
    assert first.labels.tolist() == second.labels.tolist()
    assert first.sample_ids.tolist() == second.sample_ids.tolist()
    assert first.bad == second.bad


def joined(batches: list[StreamBatch]) -> StreamBatch:
    """The shares of several ranks as one batch."""
    return StreamBatch(
        {name: torch.cat([batch.draws[name] for batch in batches], dim=1) for name in GROUPS},
        {},
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.sample_ids for batch in batches]),
        [bad for batch in batches for bad in batch.bad],
        {name: torch.cat([batch.crops[name] for batch in batches], dim=1) for name in GROUPS},
    )


def test_a_batch_holds_every_group(shards: Path) -> None:
    batch = stream(open_shards(shards), config(5), batches=1)[0]
    assert batch.crops["global"].shape == (2, 5, 3, 8, 8)
    assert batch.crops["global"].movedim(2, -1).is_contiguous()  # as the resize makes them: one copy to a device
    assert batch.crops["local"].shape == (3, 5, 3, 4, 4)
    assert batch.crops["local"].dtype == torch.uint8
    assert batch.draws["global"].shape[:2] == (2, 5)
    assert batch.draws["local"].dtype == torch.float32
    assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
    assert batch.labels.tolist() == (batch.sample_ids % 4).tolist()
    assert batch.bad == []
    # views differ from each other, and so do the views of one sample in two epochs
    assert not torch.equal(batch.crops["global"][0], batch.crops["global"][1])


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 2), (4, 1), (1, 20), (2, 10), (2, 5)])
def test_each_epoch_has_every_sample_once(shards: Path, world_size: int, batch_size: int) -> None:
    index = open_shards(shards)
    batches = 20 // (world_size * batch_size)
    seen = [
        number
        for rank in range(world_size)
        for batch in stream(index, config(batch_size), rank=rank, world_size=world_size, batches=batches)
        for number in batch.sample_ids.tolist()
    ]
    assert sorted(seen) == list(range(20))


def test_batches_are_the_same_for_any_number_of_ranks(shards: Path) -> None:
    index = open_shards(shards)
    whole = stream(index, config(12), batches=4)  # crosses the end of the epoch
    for world_size in (2, 3, 4):
        shares = [
            stream(index, config(12 // world_size), rank=rank, world_size=world_size, batches=4)
            for rank in range(world_size)
        ]
        for number, batch in enumerate(whole):
            assert_equal(batch, joined([share[number] for share in shares]))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(shards: Path, workers: int) -> None:
    index = open_shards(shards)
    for first, second in zip(
        stream(index, config(6), batches=7), stream(index, config(6, workers=workers), batches=7), strict=True
    ):
        assert_equal(first, second)


def test_reading_goes_on_from_a_position(shards: Path) -> None:
    index = open_shards(shards)
    whole = stream(index, config(6), batches=8)
    for first, second in zip(whole[5:], stream(index, config(6), position=30, batches=3), strict=True):
        assert_equal(first, second)
    # with another batch size too: positions 12 ... 23 are positions 12 ... 23
    assert_equal(joined(whole[2:4]), stream(index, config(12), position=12, batches=1)[0])


def test_samples_have_other_crops_in_the_next_epoch(shards: Path) -> None:
    first, second = stream(open_shards(shards), config(20), batches=2)
    order = torch.argsort(first.sample_ids), torch.argsort(second.sample_ids)
    assert first.sample_ids.tolist() != second.sample_ids.tolist()
    crops = [batch.crops["global"][:, by] for batch, by in zip((first, second), order, strict=True)]
    assert not any(torch.equal(crops[0][:, i], crops[1][:, i]) for i in range(20))


def test_the_seed_changes_order_and_crops(shards: Path) -> None:
    index = open_shards(shards)
    first, second = (stream(index, config(20), seed=seed, batches=1)[0] for seed in (0, 1))
    assert first.sample_ids.tolist() != second.sample_ids.tolist()
    assert not torch.equal(first.crops["global"], second.crops["global"])


def test_a_further_group_changes_no_other(shards: Path) -> None:
    index = open_shards(shards)
    groups = {"global": GROUPS["global"]}
    alone = next(open_stream(index, groups, config(4), seed=0, position=0, rank=0, world_size=1))
    assert_close(alone.crops["global"], stream(index, config(4), batches=1)[0].crops["global"], rtol=0, atol=0)


def test_a_reader_survives_pickling(shards: Path) -> None:
    index = open_shards(shards)
    samples = Samples(index, Order(index.shard_counts, 0), seed=0, substitutes=False)
    reader = CropReader(samples, ViewSampler(GROUPS, {}, seed=0, global_batch=4), batch_size=4)
    assert_equal(read(reader, 4), read(pickle.loads(pickle.dumps(reader)), 4))


def test_large_images_are_decoded_few_at_a_time(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_shards(shards)
    whole = stream(index, config(9), batches=1)[0]
    monkeypatch.setattr("ssl_pipeline.data.crop_reader.CHUNK_BYTES", 900)  # two or three images of 360
    assert_equal(whole, stream(index, config(9), batches=1)[0])


def test_the_global_random_state_is_left_alone(shards: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream(open_shards(shards), config(4), batches=2)
    assert torch.equal(before, torch.get_rng_state())


def test_images_without_labels_have_minus_one(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.jpg": encoded(number) for number in range(4)})
    assert stream(open_shards(tmp_path), config(4), batches=1)[0].labels.tolist() == [-1] * 4


def test_a_batch_larger_than_the_data_set_is_an_error(shards: Path) -> None:
    index = open_shards(shards)
    with pytest.raises(DataError, match=r"data\.batch_size=21 is larger than the data set: .* has 20 images"):
        open_stream(index, GROUPS, config(21), seed=0, position=0, rank=0, world_size=1)
    with pytest.raises(DataError, match=r"data\.batch_size=11 on 2 processes .* Take at most 10"):
        open_stream(index, GROUPS, config(11), seed=0, position=0, rank=0, world_size=2)


@pytest.fixture
def damaged(shards: Path) -> ShardIndex:
    """The shards with the images of samples 3 and 9 overwritten."""
    for name, number in (("part-000000.tar", 3), ("part-000001.tar", 9)):
        with tarfile.open(shards / name) as archive:
            member = archive.getmember(f"{number:04d}.jpg")
        content = bytearray((shards / name).read_bytes())
        content[member.offset_data : member.offset_data + member.size] = b"?" * member.size
        (shards / name).write_bytes(content)
    return open_shards(shards)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_stops_the_run_in_one_line(damaged: ShardIndex, workers: int) -> None:
    with pytest.raises(DataError) as error:
        stream(damaged, config(10, workers=workers), batches=2)
    assert "\n" not in str(error.value)
    raw = damaged.read(3 if "0003" in str(error.value) else 9)
    assert str(error.value).startswith(f"Cannot decode {raw.location}: no JPEG, PNG or WebP image.")


def test_a_corrupt_image_can_be_substituted(damaged: ShardIndex) -> None:
    settings = config(20, bad_samples="substitute")
    batch = stream(damaged, settings, batches=1)[0]
    assert_equal(batch, stream(damaged, config(20, bad_samples="substitute", workers=2), batches=1)[0])
    assert sorted(bad.sample for bad in batch.bad) == [3, 9]
    order = Order(damaged.shard_counts, 0, settings.block_shards).locate(range(20))[1]
    for bad in batch.bad:
        place = int(np.flatnonzero(order == bad.sample)[0])
        assert batch.sample_ids[place] == bad.substitute
        assert batch.labels[place] == bad.substitute % 4
        assert (bad.key, bad.byte) == (damaged.read(bad.sample).key, damaged.read(bad.sample).byte)
        assert bad.reason == "no JPEG, PNG or WebP image"
    untouched = ~np.isin(order, [3, 9])
    assert batch.sample_ids.numpy()[untouched].tolist() == order[untouched].tolist()


def test_nothing_but_corrupt_images_is_an_error(tmp_path: Path, write_tar: Callable) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.jpg": b"?" for number in range(4)})
    with pytest.raises(DataError, match="nor any of"):
        stream(open_shards(tmp_path), config(4, bad_samples="substitute"), batches=1)


def test_a_truncated_jpeg_is_corrupt(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    image = encoded(0, size=(64, 64))
    write_tar(tmp_path / "a.tar", {"a.jpg": image[: len(image) // 2]})
    with pytest.raises(DataError, match=r"Cannot decode a\.tar, key 'a', byte 512: image file is truncated"):
        stream(open_shards(tmp_path), config(1), batches=1)


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_worker_is_an_error_not_a_hang(shards: Path) -> None:
    before = children()
    batches = open_stream(open_shards(shards), GROUPS, config(4, workers=2), seed=0, position=0, rank=0, world_size=1)
    next(batches)
    victim = min(children() - before)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"A data worker died: .*\. .*try fewer data\.workers"):  # noqa: PT012
        os.kill(victim, signal.SIGKILL)
        for _ in batches:
            assert time.monotonic() - started < 15


def test_a_batch_moves_to_a_device(shards: Path) -> None:
    batch = stream(open_shards(shards), config(4), batches=1)[0].to("meta")
    assert batch.crops["global"].device.type == "meta"
    assert batch.draws["local"].device.type == batch.labels.device.type == batch.sample_ids.device.type == "meta"


def test_what_outlives_a_step_is_copied_even_on_the_device_that_it_is_on(shards: Path) -> None:
    batch = stream(open_shards(shards), config(4), batches=1)[0]
    moved = batch.to("cpu")
    assert moved.crops["global"].data_ptr() == batch.crops["global"].data_ptr()
    for kept, source in ((moved.labels, batch.labels), (moved.sample_ids, batch.sample_ids)):
        assert kept.tolist() == source.tolist()
        assert kept.data_ptr() != source.data_ptr()


def test_webdataset_reads_the_same_samples(shards: Path, encoded: Callable) -> None:
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    index = open_shards(shards)
    assert [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in samples] == [
        (index.read(number).key, index.read(number).image, index.read(number).label) for number in range(20)
    ]


@pytest.mark.parametrize("settings", [{"crop_on": "worker"}, {"crop_on": "device"}, {"cache": True}])
def test_an_image_of_too_many_pixels_is_named_or_another_stands_in(
    shards: Path, encoded: Callable[..., bytes], write_tar: Callable[..., Path], settings: dict[str, object]
) -> None:
    write_tar(shards / "part-000003.tar", {"0020.jpg": encoded(20, size=(30, 20)), "0020.cls": b"0"})
    index = open_shards(shards)
    limited = config(7, max_pixels=599, **settings)
    with pytest.raises(DataError, match=r"part-000003\.tar, key '0020', .*30x20 pixels are more than the limit of 599"):
        stream(index, limited, batches=3)
    substituted = stream(index, config(7, max_pixels=599, bad_samples="substitute", **settings), batches=3)
    assert [bad.key for batch in substituted for bad in batch.bad] == ["0020"]
    whole = stream(index, config(7, max_pixels=600, **settings), batches=3)
    assert sum(len(batch.bad) for batch in whole) == 0
