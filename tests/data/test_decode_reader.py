"""Workers that only decode, and data sets that stay decoded: the same batches as those that workers crop."""

import pickle
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from ssl_pipeline import machine
from ssl_pipeline.augment.draw import ViewSampler, crop_boxes, group_uniforms
from ssl_pipeline.augment.resample import crop_and_resize_batch
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data import device_cache
from ssl_pipeline.data.batches import DecodedImages, StreamBatch
from ssl_pipeline.data.decode import decode_image
from ssl_pipeline.data.decode_reader import DecodedReader
from ssl_pipeline.data.device_cache import decode_all
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.order import Order
from ssl_pipeline.data.samples import Samples
from ssl_pipeline.data.shards.open import ShardIndex, open_shards

GROUPS = {"global": ViewGroup(count=2, size=8), "local": ViewGroup(count=3, size=4, blur_prob=0.5)}
SIZES = [(12, 10), (30, 7), (9, 40), (16, 16)]  # (width, height)


@pytest.fixture
def varied(tmp_path: Path, write_tar: Callable, encoded: Callable) -> ShardIndex:
    """16 images of four sizes, all of them labelled."""
    members = {}
    for number in range(16):
        members[f"{number:04d}.png"] = encoded(number, size=SIZES[number % 4], format="PNG")
        members[f"{number:04d}.cls"] = str(number % 3).encode()
    write_tar(tmp_path / "a.tar", members)
    return open_shards(tmp_path)


def reader_of(index: ShardIndex, *, groups: dict[str, ViewGroup] = GROUPS, substitutes: bool = False) -> DecodedReader:
    samples = Samples(index, Order(index.shard_counts, 0), seed=0, substitutes=substitutes)
    return DecodedReader(samples, ViewSampler(groups, {}, seed=0, global_batch=6), batch_size=6)


def read(reader: DecodedReader, positions: range) -> StreamBatch:
    """By way of a slot of shared memory and a pipe, which hold an older batch."""
    slot = {
        name: torch.full(shape, 1, dtype=dtype) if dtype == torch.bool else torch.full(shape, 77, dtype=dtype)
        for name, (shape, dtype) in reader.layout(positions).items()
    }
    reader = pickle.loads(pickle.dumps(reader))
    return StreamBatch.over(slot, pickle.loads(pickle.dumps(reader(positions, slot))))


def images_of(batch: StreamBatch) -> list[np.ndarray]:
    images, table = batch.images, batch.images.table
    return [
        images.pixels[offset : offset + 3 * height * width].numpy().reshape(height, width, 3)
        for offset, height, width in zip(table.offsets, table.heights, table.widths, strict=True)
    ]


def assert_equal(first: StreamBatch, second: StreamBatch) -> None:
    for one, other in zip(images_of(first), images_of(second), strict=True):
        assert one.tolist() == other.tolist()
    for name in GROUPS:
        assert first.images.boxes[name].tolist() == second.images.boxes[name].tolist()
        assert first.images.flips[name].tolist() == second.images.flips[name].tolist()
        assert torch.equal(first.draws[name], second.draws[name])
    assert first.labels.tolist() == second.labels.tolist()
    assert first.sample_ids.tolist() == second.sample_ids.tolist()
    assert first.bad == second.bad


def test_a_batch_holds_the_decoded_images_one_after_another(varied: ShardIndex, encoded: Callable) -> None:
    reader = reader_of(varied)
    batch = read(reader, range(6))
    samples = reader.samples.locate(range(6))[1].tolist()
    assert batch.sample_ids.tolist() == samples
    assert batch.labels.tolist() == [sample % 3 for sample in samples]
    for sample, image in zip(samples, images_of(batch), strict=True):
        width, height = SIZES[sample % 4]
        noise = np.random.default_rng(sample).integers(0, 256, (height, width, 3), dtype=np.uint8)
        assert image.tolist() == noise.tolist()


def test_boxes_lie_in_their_images(varied: ShardIndex) -> None:
    images = read(reader_of(varied), range(6)).images
    for boxes_VB4 in images.boxes.values():
        assert (boxes_VB4[..., :2] >= 0).all()
        assert (boxes_VB4[..., 0] + boxes_VB4[..., 2] <= images.table.heights).all()
        assert (boxes_VB4[..., 1] + boxes_VB4[..., 3] <= images.table.widths).all()


def test_only_what_is_used_of_a_slot_travels_to_the_device(varied: ShardIndex) -> None:
    batch = read(reader_of(varied), range(6))
    images, table = batch.images, batch.images.table
    used = 3 * int((table.heights * table.widths).sum())
    assert len(images.pixels) == used + 3 * table.widths.max()
    moved = batch.to("meta")
    assert moved.images.pixels.is_meta
    assert moved.images.pixels.shape == images.pixels.shape
    assert moved.draws["local"].is_meta
    assert moved.labels.is_meta
    assert moved.sample_ids.is_meta
    assert moved.cropped(GROUPS)["local"].shape == (3, 6, 3, 4, 4)  # and nothing is asked of the device


def test_a_batch_has_room_for_just_its_images_and_a_row(varied: ShardIndex) -> None:
    reader = reader_of(varied)
    for start in (0, 6, 12):
        samples = reader.samples.locate(range(start, start + 6))[1]
        sizes = [3 * SIZES[sample % 4][0] * SIZES[sample % 4][1] for sample in samples.tolist()]
        assert reader.layout(range(start, start + 6))["pixels"][0] == (sum(sizes) + 3 * 30,)
    usual = sum(3 * width * height for width, height in SIZES) / 4
    assert reader.layout()["pixels"][0] == (6 * usual + 3 * 30,)


def test_memory_is_planned_by_the_block_with_the_largest_images(
    tmp_path: Path, write_tar: Callable, encoded: Callable
) -> None:
    for number, (count, side) in enumerate([(4, 10), (2, 40), (0, 0), (3, 30), (9, 20)]):
        files = {f"{image}.png": encoded(image, size=(side, side), format="PNG") for image in range(count)}
        write_tar(tmp_path / f"{number}.tar", files)
    index = open_shards(tmp_path)
    usual = {
        block_shards: Samples(
            index, Order(index.shard_counts, 0, block_shards), seed=0, substitutes=False
        ).usual_pixel_bytes()
        for block_shards in (1, 2, 3, 16)
    }
    assert usual[1] == 3 * 40 * 40
    assert usual[2] == 3 * (2 * 1600 + 3 * 900) / 5
    assert usual[3] == 3 * (2 * 1600 + 3 * 900 + 9 * 400) / 14
    assert usual[16] == 3 * (2 * 1600 + 3 * 900 + 9 * 400 + 4 * 100) / 18


# images that stand in for damaged ones


@pytest.fixture
def damaged(tmp_path: Path, write_tar: Callable, encoded: Callable) -> ShardIndex:
    """12 images, every other one small and damaged behind its head."""
    files = {}
    for number in range(12):
        side = 4 if number % 2 else 9 + number
        data = encoded(number, size=(side, side), format="PNG")
        files[f"{number:02d}.png"] = data[:-30] if number % 2 else data
    write_tar(tmp_path / "a.tar", files)
    index = open_shards(tmp_path)
    assert index.sizes()[1].tolist() == [4, 4]
    return index


def test_what_finds_no_room_beside_substitutes_is_there_all_the_same(damaged: ShardIndex) -> None:
    reader, displaced = reader_of(damaged, substitutes=True), 0
    for start in (0, 6, 12):
        positions = range(start, start + 6)
        slot = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in reader.layout(positions).items()}
        outcome = reader(positions, slot)
        displaced += outcome.displaced is not None
        batch = StreamBatch.over(slot, outcome)
        table = batch.images.table
        assert len(batch.images.pixels) >= 3 * int((table.heights * table.widths).sum() + table.widths.max())
        assert len(outcome.bad) >= 2
        for sample, image in zip(batch.sample_ids.tolist(), images_of(batch), strict=True):
            assert sample % 2 == 0
            assert image.tolist() == decode_image(damaged.read(sample).image).tolist()
    assert displaced >= 2


def test_a_cache_shows_the_pixels_of_the_substitute_for_a_damaged_image(damaged: ShardIndex) -> None:
    samples = Samples(damaged, Order(damaged.shard_counts, 0), seed=0, substitutes=True)
    cache = decode_all(samples, device=torch.device("cpu"), workers=0, rank=0, keepalive=lambda: None)
    assert len(cache.pixels) == int(damaged.shard_pixel_bytes.sum()) + 3 * damaged.widest
    assert sorted(cache.bad) == [1, 3, 5, 7, 9, 11]
    for sample, image in zip(cache.sample_ids.tolist(), cache.images.views(cache.pixels), strict=True):
        assert image.tolist() == decode_image(damaged.read(sample).image).tolist()


def crops_at_once(images: DecodedImages, name: str) -> torch.Tensor:
    """What a device makes of them, on a CPU."""
    table = images.table
    where = images.pixels, table.offsets, table.heights, table.widths, images.boxes[name], images.flips[name]
    return crop_and_resize_batch(*where, size=images.sizes[name], interpolation="bicubic")


def test_on_a_device_the_crops_are_those_of_the_cpu_before_rounding(varied: ShardIndex) -> None:
    groups = {"pad": ViewGroup(count=2, size=20, crop="pad"), "view": ViewGroup(count=2, size=20, scale=(0.5, 1.0))}
    batch = read(reader_of(varied, groups=groups), range(6))
    rounded = batch.cropped(groups)
    exact = {name: crops_at_once(batch.images, name) for name in groups}
    for name in groups:
        assert rounded[name].dtype == torch.uint8
        assert exact[name].dtype == torch.float32
        assert exact[name].shape == rounded[name].shape == (2, 6, 3, 20, 20)
        # noise overshoots, which 8 bits cut off between the rows and the columns
        assert (exact[name] - rounded[name]).abs().mean() < 1.0


def test_a_kept_batch_is_not_overwritten(varied: ShardIndex) -> None:
    reader = reader_of(varied)
    slot = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in reader.layout(range(6)).items()}
    kept = StreamBatch.over(slot, reader(range(6), slot)).clone()
    for tensor in slot.values():
        tensor.zero_()
    assert_equal(kept, read(reader, range(6)))


# the cache


def everything(
    index: ShardIndex, *, workers: int = 0, keepalive: Callable[[], None] = lambda: None
) -> device_cache.CachedImages:
    samples = Samples(index, Order(index.shard_counts, 0), seed=0, substitutes=False)
    return decode_all(samples, device=torch.device("cpu"), workers=workers, rank=0, keepalive=keepalive)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("slot_bytes", [1, 2000, 10**6])
def test_the_cache_holds_every_image(
    varied: ShardIndex, workers: int, slot_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_cache, "SLOT_BYTES", slot_bytes)
    cache = everything(varied, workers=workers)
    assert cache.labels.tolist() == [number % 3 for number in range(16)]
    assert cache.sample_ids.tolist() == list(range(16))
    for number in range(16):
        width, height = SIZES[number % 4]
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        offset = cache.images.offsets[number]
        assert cache.pixels[offset : offset + noise.size].tolist() == noise.ravel().tolist()
        assert (cache.images.heights[number], cache.images.widths[number]) == (height, width)


def test_the_cache_takes_just_the_bytes_of_its_images_and_a_row(varied: ShardIndex) -> None:
    assert len(everything(varied).pixels) == 4 * sum(3 * width * height for width, height in SIZES) + 3 * 30


def test_an_index_with_a_wrong_size_is_told(varied: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = varied.sizes()
    sizes[5] = sizes[5, ::-1]
    monkeypatch.setattr(varied, "sizes", lambda samples=None: sizes if samples is None else sizes[samples])
    with pytest.raises(DataError, match=r"The index of '.*' has another size for image 5 than .* Delete the index"):
        everything(varied)


def test_a_cache_that_does_not_fit_is_refused(varied: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cache, "free_bytes", lambda _device: 4000)
    with pytest.raises(DataError) as error:
        everything(varied)
    sentence = str(error.value)
    assert sentence.startswith("data.cache=true needs 1.")
    assert "for the 16 decoded images of" in sentence
    assert "more than half of the 4e-06 GB that one may still take on cpu. Leave it out" in sentence
    assert "\n" not in sentence


def test_a_cache_is_held_to_the_memory_of_the_container(varied: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_left_in_groups", lambda: iter([4000]))
    with pytest.raises(DataError, match=r"more than half of the 4e-06 GB"):
        everything(varied)


def test_a_cache_that_fills_gives_keepalives_and_shows_how_far_it_is(
    varied: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars, progress = list[tqdm](), list[int]()

    def quiet(**options: object) -> tqdm:
        bars.append(tqdm(**options | {"file": StringIO()}))
        return bars[0]

    monkeypatch.setattr(device_cache, "SLOT_BYTES", 3000)  # four images
    monkeypatch.setattr(device_cache, "tqdm", quiet)
    everything(varied, keepalive=lambda: progress.append(bars[0].n))
    assert progress == [4, 8, 12, 16]
    assert (bars[0].total, bars[0].desc) == (16, f"decoding {varied.source}")


def test_chains_of_substitutes_belong_to_the_sample_that_was_asked_for() -> None:
    entries = [
        device_cache.BadSample(sample, None, "", "", 0, "", to)
        for sample, to in ((3, 9), (9, 4), (7, 3), (3, 5), (8, 2))
    ]
    bad = dict[int, list[device_cache.BadSample]]()
    device_cache._add_chains(bad, entries)
    assert {sample: [entry.substitute for entry in chain] for sample, chain in bad.items()} == {
        3: [9, 4],
        7: [3, 5],
        8: [2],
    }


def test_crop_boxes_follow_the_images_own_size(varied: ShardIndex) -> None:
    # what a worker draws before cropping is what a decoding worker sends
    reader = reader_of(varied)
    batch = read(reader, range(6))
    epochs, samples = reader.samples.locate(range(6))
    numbers = group_uniforms("local", GROUPS["local"], seed=0, epochs_B=epochs, samples_B=samples)
    table = batch.images.table
    boxes, flips = crop_boxes(numbers, table.heights, table.widths, GROUPS["local"])
    assert batch.images.boxes["local"].tolist() == boxes.tolist()
    assert batch.images.flips["local"].tolist() == flips.tolist()
