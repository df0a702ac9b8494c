"""Crop boxes against torchvision's RandomResizedCrop, resized crops against Pillow."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import RandomResizedCrop

from ssl_pipeline.augment.crops import crop_and_resize
from ssl_pipeline.augment.draw import CropUniform, crop_boxes, num_uniforms
from ssl_pipeline.augment.views import ViewGroup

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def uniforms(views, images, seed=0):
    return np.random.default_rng(seed).random((views, images, num_uniforms(ViewGroup(size=8))))


def image_sizes(count, seed=1):
    generator = np.random.default_rng(seed)
    return generator.integers(1, 600, count), generator.integers(1, 600, count)


def picture(height, width, seed=0):
    """A photograph's worth of structure: a few colours, edges, little noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    smooth[height // 3 : height // 2, width // 4 : width // 2] //= 3
    return np.clip(smooth + generator.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8)


def resized(pixels, box, size, *, interpolation="bicubic", flip=False):
    out = torch.zeros(3, size, size, dtype=torch.uint8)
    crop_and_resize(torch.from_numpy(pixels), box, flip=flip, interpolation=interpolation, out=out)
    return out.permute(1, 2, 0).numpy().astype(np.int64)


def pillows(pixels, box, size, interpolation="bicubic"):
    """Rows, then columns, as Pillow did up to version 12; newer ones sometimes begin with the columns."""
    top, left, height, width = box
    crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    rows = crop.resize((size, height), RESAMPLING[interpolation])
    return np.asarray(rows.resize((size, size), RESAMPLING[interpolation])).astype(np.int64)


def box_in_a_loop(numbers, height, width, group):
    """RandomResizedCrop.get_params, as torchvision writes it, from our uniforms."""
    low, high = (math.log(bound) for bound in group.aspect)
    for attempt in range(10):
        smallest, largest = group.scale
        area = height * width * (smallest + (largest - smallest) * numbers[CropUniform.AREA + attempt])
        aspect = math.exp(low + (high - low) * numbers[CropUniform.ASPECT + attempt])
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(numbers[CropUniform.TOP] * (height - h + 1))
            return top, int(numbers[CropUniform.LEFT] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < min(group.aspect):
        h = round(w / min(group.aspect))
    elif width / height > max(group.aspect):
        w = round(h * max(group.aspect))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.4), (0.9, 1.0)])
def test_boxes_equal_the_loop_over_tries(scale):
    group = ViewGroup(count=2, size=96, scale=scale)
    numbers, (heights, widths) = uniforms(2, 500), image_sizes(500)
    boxes, flips = crop_boxes(numbers, heights, widths, group)
    assert boxes.dtype == np.int64
    assert flips.dtype == np.bool_
    fallbacks = 0
    for view in range(2):
        for image, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
            box = tuple(boxes[view, image].tolist())
            assert box == box_in_a_loop(numbers[view, image], height, width, group)
            fallbacks += box[2] == height or box[3] == width
    assert fallbacks > 20


class _Replay:
    """Stands in for torch's generator, so that torchvision consumes our uniforms."""

    def __init__(self, numbers):
        self.tries = iter(zip(numbers[CropUniform.AREA :][:10], numbers[CropUniform.ASPECT :][:10], strict=True))
        self.pending = iter(())
        self.position = iter((numbers[CropUniform.TOP], numbers[CropUniform.LEFT]))

    def empty(self, _count):
        return self

    def uniform_(self, low, high):
        number = next(self.pending, None)
        if number is None:
            self.pending = iter(next(self.tries))
            number = next(self.pending)
        return torch.tensor(float(low) + (float(high) - float(low)) * number, dtype=torch.float64)

    def randint(self, low, high, size):
        return torch.tensor([low + int(next(self.position) * (high - low))])


def test_boxes_equal_torchvisions_from_the_same_uniforms(monkeypatch):
    group = ViewGroup(size=96, scale=(0.08, 1.0))
    numbers, (heights, widths) = uniforms(1, 300), image_sizes(300)
    boxes, _ = crop_boxes(numbers, heights, widths, group)
    theirs = []
    for row, height, width in zip(numbers[0], heights.tolist(), widths.tolist(), strict=True):
        image, replay = torch.empty(3, height, width), _Replay(row)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", replay.empty)
            patch.setattr(torch, "randint", replay.randint)
            theirs.append(RandomResizedCrop.get_params(image, list(group.scale), list(group.aspect)))
    # torchvision keeps the logarithm of the aspect in float32, which may move a rounding
    assert np.abs(boxes[0] - np.array(theirs)).max() <= 1
    assert (boxes[0] == np.array(theirs)).all(axis=-1).mean() > 0.99


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (60, 300)])
def test_boxes_have_torchvisions_distribution(height, width):
    group = ViewGroup(size=96, scale=(0.05, 0.9))
    ours = crop_boxes(uniforms(1, 20_000), np.full(20_000, height), np.full(20_000, width), group)[0][0]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, list(group.scale), list(group.aspect)) for _ in range(2_000)]
    for ours_column, theirs_column in zip(ours.T, np.array(theirs).T, strict=True):
        assert ks_2samp(ours_column, theirs_column).pvalue > 1e-3
    assert ks_2samp(ours[:, 2] * ours[:, 3], np.prod(np.array(theirs)[:, 2:], axis=1)).pvalue > 1e-3


def test_boxes_lie_inside_of_images_of_any_shape():
    group = ViewGroup(count=3, size=32, scale=(0.01, 1.0))
    heights, widths = image_sizes(2_000)
    heights[:5], widths[:5] = (1, 1, 599, 2, 3), (1, 599, 1, 3, 2)
    boxes, _ = crop_boxes(uniforms(3, 2_000), heights, widths, group)
    top, left, height, width = np.moveaxis(boxes, -1, 0)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()


def test_flips_follow_each_views_probability():
    group = ViewGroup(count=3, size=32, flip_prob=(0.0, 0.3, 1.0))
    flips = crop_boxes(uniforms(3, 10_000), np.full(10_000, 40), np.full(10_000, 40), group)[1]
    assert flips[0].sum() == 0
    assert abs(flips[1].mean() - 0.3) < 0.02
    assert flips[2].all()


def test_pad_boxes_shift_the_whole_image_uniformly():
    group = ViewGroup(size=32, crop="pad", padding=0.125)
    boxes, _ = crop_boxes(uniforms(1, 9_000), np.full(9_000, 32), np.full(9_000, 32), group)
    assert (boxes[..., 2:] == 32).all()
    for shift in (boxes[0, :, 0], boxes[0, :, 1]):
        values, counts = np.unique(shift, return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 150, 200), 64),
        ((7, 11, 120, 90), 32),
        ((3, 5, 33, 40), 96),
        ((50, 60, 8, 8), 16),
        ((1, 2, 1, 1), 4),
        ((0, 199, 150, 1), 20),
        ((10, 20, 100, 30), 30),
    ],
)
def test_crops_are_within_one_level_of_pillows(box, size, interpolation):
    pixels = picture(150, 200)
    expected = pillows(pixels, box, size, interpolation)
    assert np.abs(resized(pixels, box, size, interpolation=interpolation) - expected).max() <= 1
    flipped = resized(pixels, box, size, interpolation=interpolation, flip=True)
    assert np.abs(flipped - expected[:, ::-1]).max() <= 1


def test_pure_noise_too_is_within_one_level_of_pillow_but_for_a_few_values():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    gap = np.abs(resized(pixels, (0, 0, 300, 260), 224) - pillows(pixels, (0, 0, 300, 260), 224))
    assert gap.max() <= 2
    assert (gap > 1).mean() < 1e-3


def test_a_small_image_can_be_enlarged():
    pixels = picture(8, 8)
    assert np.abs(resized(pixels, (0, 0, 8, 8), 16) - pillows(pixels, (0, 0, 8, 8), 16)).max() <= 1


def test_a_crop_of_the_target_size_is_copied():
    pixels = picture(40, 50)
    assert (resized(pixels, (3, 4, 32, 32), 32) == pixels[3:35, 4:36]).all()
    assert (resized(pixels, (3, 4, 32, 32), 32, flip=True) == pixels[3:35, 4:36][:, ::-1]).all()


@pytest.mark.parametrize(("top", "left"), [(-4, 3), (4, -4), (0, 0), (2, 4)])
def test_boxes_out_of_the_image_reflect_it(top, left):
    pixels = picture(32, 32)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    expected = padded[4 + top : 36 + top, 4 + left : 36 + left]
    assert (resized(pixels, (top, left, 32, 32), 32) == expected).all()
    assert np.abs(resized(pixels, (top, left, 32, 32), 16) - pillows(expected, (0, 0, 32, 32), 16)).max() <= 1


def test_crops_of_a_view_into_a_larger_tensor_are_right():
    images = torch.from_numpy(np.stack([picture(20, 20, seed) for seed in range(3)]))
    out = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    crop_and_resize(images[2], np.array([2, 3, 12, 14]), flip=False, interpolation="bicubic", out=out[1])
    expected = resized(picture(20, 20, 2), (2, 3, 12, 14), 8)
    assert (out[1].permute(1, 2, 0).numpy() == expected).all()
    assert (out[0] == 0).all()
