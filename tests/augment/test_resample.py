"""Crops of a whole batch at once against torch's antialiased `interpolate`, one crop at a time."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from ssl_pipeline.augment import resample
from ssl_pipeline.augment.crops import crop_and_resize
from ssl_pipeline.augment.draw import crop_boxes, num_uniforms
from ssl_pipeline.augment.resample import crop_and_resize_batch
from ssl_pipeline.augment.views import ViewGroup

SIZES = [(60, 50), (7, 9), (1, 1), (3, 90), (131, 120), (24, 24), (1, 40)]


def noise(sizes=SIZES, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def drawn(images, group, seed=1):
    numbers = np.random.default_rng(seed).random((group.count, len(images), num_uniforms(group)))
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    return crop_boxes(numbers, heights, widths, group)


def at_once(images, boxes, flips, *, size, interpolation="bicubic"):
    """The images in a flat buffer without a byte to spare, behind a few that are nobody's."""
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    pixels = np.concatenate([np.full(5, 255, np.uint8), *(image.ravel() for image in images)])
    offsets = 5 + 3 * (np.cumsum(heights * widths) - heights * widths)
    return crop_and_resize_batch(
        torch.from_numpy(pixels), offsets, heights, widths, boxes, flips, size=size, interpolation=interpolation
    )


def one_at_a_time(images, boxes, flips, *, size, interpolation="bicubic"):
    return torch.stack([
        torch.stack([
            alone(image, box, flip, size=size, interpolation=interpolation)
            for image, box, flip in zip(images, boxes_B4.tolist(), flips_B.tolist(), strict=True)
        ])
        for boxes_B4, flips_B in zip(boxes, flips, strict=True)
    ])  # fmt: skip


def alone(image, box, flip, *, size, interpolation):
    top, left, height, width = box
    reach = [(-top, top + height - image.shape[0]), (-left, left + width - image.shape[1])]
    padded = np.pad(image, [*([max(side, 0) for side in pair] for pair in reach), (0, 0)], mode="reflect")
    crop = padded[max(top, 0) :, max(left, 0) :][:height, :width]
    crop = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)[None].float()
    out = interpolate(crop, size=(size, size), mode=interpolation, antialias=True)[0].clamp(0, 255)
    return out.flip(-1) if flip else out


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [1, 5, 24, 96])
def test_crops_equal_interpolate(size, interpolation):
    group = ViewGroup(count=3, size=size, scale=(0.01, 1.0), interpolation=interpolation)
    images = noise()
    boxes, flips = drawn(images, group)
    assert flips.any()
    assert not flips.all()
    got = at_once(images, boxes, flips, size=size, interpolation=interpolation)
    assert got.shape == (3, len(images), 3, size, size)
    assert got.dtype == torch.float32
    expected = one_at_a_time(images, boxes, flips, size=size, interpolation=interpolation)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(700, 900), (40, 2500), (2500, 40)])
def test_large_images_are_averaged_over_all_their_pixels(shape):
    images = noise([shape])
    boxes, flips = np.array([[[0, 0, *shape]]]), np.array([[True]])
    got = at_once(images, boxes, flips, size=16)
    torch.testing.assert_close(got, one_at_a_time(images, boxes, flips, size=16), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [24, 17, 64])
@pytest.mark.parametrize("padding", [0.125, 0.5])
def test_boxes_that_reach_out_are_reflected(size, padding):
    group = ViewGroup(count=3, size=size, crop="pad", padding=padding)
    images = noise()
    boxes, flips = drawn(images, group)
    assert (boxes[..., :2] < 0).any()
    got = at_once(images, boxes, flips, size=size)
    torch.testing.assert_close(got, one_at_a_time(images, boxes, flips, size=size), rtol=0, atol=1e-3)


def test_a_crop_of_the_views_size_is_copied():
    images = noise([(30, 40)] * 2)
    boxes, flips = np.array([[[3, 4, 24, 24], [6, 16, 24, 24]]]), np.array([[False, True]])
    got = at_once(images, boxes, flips, size=24)[0]
    assert got[0].tolist() == images[0][3:27, 4:28].transpose(2, 0, 1).tolist()
    assert got[1].tolist() == images[1][6:30, 16:40].transpose(2, 0, 1)[:, :, ::-1].tolist()


def test_chunks_of_any_size_give_the_same_crops(monkeypatch):
    group = ViewGroup(count=2, size=8, scale=(0.05, 1.0))
    images = noise()
    boxes, flips = drawn(images, group)
    whole = at_once(images, boxes, flips, size=8)
    for elements in (1, 4000, 40_000):
        monkeypatch.setattr(resample, "CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(at_once(images, boxes, flips, size=8), whole, rtol=0, atol=1e-4)
    monkeypatch.undo()
    monkeypatch.setattr(resample, "PADDING_MATTERS", 0)
    torch.testing.assert_close(at_once(images, boxes, flips, size=8), whole, rtol=0, atol=1e-4)


def test_the_padded_buffer_is_bounded(monkeypatch):
    monkeypatch.setattr(resample, "CHUNK_ELEMENTS", 10_000)
    crops = np.zeros((50, 9), np.int64)
    generator = np.random.default_rng(0)
    crops[:, resample.Column.HEIGHT], crops[:, resample.Column.WIDTH] = generator.integers(1, 40, (2, 50))
    crops = crops[np.argsort(-crops[:, resample.Column.HEIGHT] * crops[:, resample.Column.WIDTH])]
    chunks = [crops[chunk] for chunk in resample._chunks(crops)]
    assert sum(map(len, chunks)) == 50
    assert len(chunks) < 25
    for chunk in chunks:
        assert len(chunk) == 1 or 3 * len(chunk) * chunk[:, 5].max() * chunk[:, 6].max() <= 10_000


def test_autocast_changes_nothing():
    images = noise()
    boxes, flips = drawn(images, ViewGroup(count=2, size=24))
    plain = at_once(images, boxes, flips, size=24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(at_once(images, boxes, flips, size=24), plain)


def test_they_are_the_workers_crops_before_rounding():
    # the 8-bit kernel rounds twice, after the rows and after the columns
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    images = [np.array(coarse.resize((200, 150), Image.Resampling.BICUBIC))]
    group = ViewGroup(count=6, size=48)
    boxes, flips = drawn(images, group)
    got = at_once(images, boxes, flips, size=48)
    worker = torch.zeros(got.shape, dtype=torch.uint8)
    for view in range(6):
        crop_and_resize(
            torch.from_numpy(images[0]),
            boxes[view, 0],
            flip=bool(flips[view, 0]),
            interpolation="bicubic",
            out=worker[view, 0],
        )
    difference = (got - worker).abs()
    assert difference.max() < 1.2
    assert difference.mean() < 0.35


@pytest.mark.parametrize("group", [ViewGroup(count=2, size=24), ViewGroup(count=2, size=24, crop="pad")])
def test_nothing_is_asked_of_the_device(group):
    # a tensor on the meta device has no values: whatever the host would wait for is an error
    images = noise()
    boxes, flips = drawn(images, group)
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    offsets = 3 * (np.cumsum(heights * widths) - heights * widths)
    for spare in (0, 10_000):
        pixels = torch.empty(3 * int((heights * widths).sum()) + spare, dtype=torch.uint8, device="meta")
        where = (offsets, heights, widths, boxes, flips)
        got = crop_and_resize_batch(pixels, *where, size=24, interpolation="bicubic")
        assert got.is_meta
        assert got.shape == (2, len(images), 3, 24, 24)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_crops_without_a_word_to_the_host():
    group = ViewGroup(count=4, size=32)
    images = noise([(90, 120), (50, 40), (200, 30)])
    boxes, flips = drawn(images, group)
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in images]))
    offsets = 3 * (np.cumsum(heights * widths) - heights * widths)
    where = (offsets, heights, widths, boxes, flips)
    expected = crop_and_resize_batch(pixels, *where, size=32, interpolation="bicubic")
    pixels = pixels.cuda()
    crop_and_resize_batch(pixels, *where, size=32, interpolation="bicubic")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = crop_and_resize_batch(pixels, *where, size=32, interpolation="bicubic")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-3)
