"""RandAugment against Pillow and torchvision, one image at a time."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chisquare, ks_2samp
from torch.testing import assert_close
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from ssl_pipeline.augment.draw import draw_operations, num_draws, num_uniforms
from ssl_pipeline.augment.on_accelerator import augment_on_accelerator
from ssl_pipeline.augment.on_cpu import augment_on_cpu
from ssl_pipeline.augment.operations.cutout import CUTOUT_LEVEL, cut_out
from ssl_pipeline.augment.operations.rand_augment import RANGES, RandOperation, apply_rounds
from ssl_pipeline.augment.photometric import apply_photometric, stages_per_view
from ssl_pipeline.augment.views import ViewGroup
from tests.augment.columns import NUM_COLUMNS

ENHANCERS = {
    RandOperation.BRIGHTNESS: (ImageEnhance.Brightness, torchvision.adjust_brightness),
    RandOperation.COLOUR: (ImageEnhance.Color, torchvision.adjust_saturation),
    RandOperation.CONTRAST: (ImageEnhance.Contrast, torchvision.adjust_contrast),
    RandOperation.SHARPNESS: (ImageEnhance.Sharpness, torchvision.adjust_sharpness),
}
GEOMETRIC = list(RandOperation)[RandOperation.ROTATE : RandOperation.TRANSLATE_Y + 1]
PLAIN = {"flip_prob": 0.0, "jitter_prob": 0.0, "gray_prob": 0.0}


def images(size=16):
    """Noise, noise of few levels, a gradient, and flat images."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, size, size), generator=generator)
    dark = torch.randint(40, 90, (4, 3, size, size), generator=generator)
    ramp = (torch.arange(size) * 255 // max(size - 1, 1)).expand(1, 3, size, size)
    flat = torch.tensor([0, 100, 255])[:, None, None, None].expand(3, 3, size, size)
    mixed = torch.cat([noise[:1, :1], flat[1:2, :1], ramp[:, :1]], dim=1)  # a channel of each kind
    return torch.cat([noise, dark, ramp, flat, mixed]).to(torch.uint8)


def magnitudes(operation):
    low, high = RANGES[operation]
    if operation == RandOperation.POSTERIZE:
        return [4.0, 5.0, 6.0, 7.0]
    return [low] if low == high else [low, low + 0.31 * (high - low), (low + high) / 2, high - 1e-3]


def by_pillow(image_CHW, operation, magnitude):
    image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    width, height = image.size
    if operation in ENHANCERS:
        image = ENHANCERS[operation][0](image).enhance(magnitude)
    elif operation == RandOperation.ROTATE:
        image = image.rotate(math.degrees(magnitude))
    elif operation in GEOMETRIC:
        matrix = {
            RandOperation.SHEAR_X: (1, magnitude, 0, 0, 1, 0),
            RandOperation.SHEAR_Y: (1, 0, 0, magnitude, 1, 0),
            RandOperation.TRANSLATE_X: (1, 0, magnitude * width, 0, 1, 0),
            RandOperation.TRANSLATE_Y: (1, 0, 0, 0, 1, magnitude * height),
        }
        image = image.transform(image.size, Image.Transform.AFFINE, matrix[operation])
    elif operation == RandOperation.POSTERIZE:
        image = ImageOps.posterize(image, int(magnitude))
    elif operation == RandOperation.SOLARIZE:
        image = ImageOps.solarize(image, magnitude)
    elif operation == RandOperation.AUTOCONTRAST:
        image = ImageOps.autocontrast(image)
    elif operation == RandOperation.EQUALIZE:
        image = ImageOps.equalize(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def by_torchvision(image_CHW, operation, magnitude):
    size = image_CHW.shape[-1]
    if operation in ENHANCERS:
        return ENHANCERS[operation][1](image_CHW, magnitude)
    if operation in GEOMETRIC:
        angle = math.degrees(magnitude) if operation == RandOperation.ROTATE else 0.0
        # the other direction: torchvision moves the image, Pillow says where a pixel comes from
        shear = -math.degrees(math.atan(magnitude))
        turned_or_moved = {
            RandOperation.ROTATE: {"angle": -angle},
            RandOperation.SHEAR_X: {"shear": [-shear, 0.0], "center": [0, 0]},
            RandOperation.SHEAR_Y: {"shear": [0.0, -shear], "center": [0, 0]},
            RandOperation.TRANSLATE_X: {"translate": [-magnitude * size, 0.0]},
            RandOperation.TRANSLATE_Y: {"translate": [0.0, -magnitude * size]},
        }[operation]
        still = {"angle": 0.0, "translate": [0.0, 0.0], "scale": 1.0, "shear": [0.0, 0.0]}
        return torchvision.affine(
            image_CHW, **(still | turned_or_moved), interpolation=InterpolationMode.NEAREST, fill=0
        )
    if operation == RandOperation.POSTERIZE:
        return torchvision.posterize(image_CHW, int(magnitude))
    if operation == RandOperation.SOLARIZE:
        return torchvision.solarize(image_CHW, magnitude) if magnitude <= 255 else image_CHW  # it refuses more
    if operation == RandOperation.AUTOCONTRAST:
        return torchvision.autocontrast(image_CHW)
    if operation == RandOperation.EQUALIZE:
        return torchvision.equalize(image_CHW)
    return image_CHW


def rows(operation, values, repeats):
    """Draws of one round: `operation` with each of the magnitudes, for `repeats` images each."""
    magnitude_N = torch.tensor(values).repeat_interleave(repeats)
    return torch.stack([torch.full_like(magnitude_N, operation), magnitude_N], dim=1)


def assert_equal_levels(actual, expected, *, levels, share):
    """At most `levels` apart, and different in at most `share` of the values."""
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() <= levels
    assert (difference > 0).float().mean() <= share


@pytest.mark.parametrize("only_due", [True, False], ids=["only_due", "everywhere"])
@pytest.mark.parametrize("size", [16, 31])
@pytest.mark.parametrize("operation", RandOperation, ids=lambda operation: operation.name)
def test_each_operation_equals_pillow_and_torchvision(operation, size, only_due):
    crops, values = images(size), magnitudes(operation)
    draws = rows(operation, values, len(crops))
    image = crops.repeat(len(values), 1, 1, 1) / 255
    levels = apply_rounds(image, draws, only_due=only_due).mul(255)
    assert_close(levels, levels.round(), atol=1e-4, rtol=0)  # whole levels
    expected = [
        torch.stack([oracle(image, operation, value) for value in values for image in crops])
        for oracle in (by_pillow, by_torchvision)
    ]
    if operation in GEOMETRIC:  # on a boundary between pixels rounding decides; Pillow's fixed point reaches wider
        assert_equal_levels(levels.round(), expected[0], levels=255, share=0.02)
        assert_equal_levels(levels.round(), expected[1], levels=255, share=0.005)
    else:
        # Pillow's own rounding in a contrast stretch; torchvision rounds the gray that it mixes in down
        rounded = (operation == RandOperation.AUTOCONTRAST, operation in ENHANCERS)
        assert_equal_levels(levels.round(), expected[0], levels=1, share=0.02 * rounded[0])
        assert_equal_levels(levels.round(), expected[1], levels=2, share=0.5 * rounded[1] + 0.02 * rounded[0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_images_go_through_every_operation(size):
    crops = torch.randint(0, 256, (len(RandOperation), 3, size, size), generator=torch.Generator().manual_seed(0))
    middle = [magnitudes(operation)[len(magnitudes(operation)) // 2] for operation in RandOperation]
    draws = torch.tensor([[float(operation), middle[operation]] for operation in RandOperation])
    both = [apply_rounds(crops / 255, draws, only_due=only_due) for only_due in (True, False)]
    assert_close(both[0], both[1], rtol=0, atol=0)
    assert both[0].isfinite().all()
    assert ((both[0] >= 0) & (both[0] <= 1)).all()


def test_two_rounds_are_one_after_the_other():
    crops = images()[:2]
    draws = torch.tensor([[RandOperation.SOLARIZE, 100.0, RandOperation.CONTRAST, 0.3]]).repeat(2, 1)
    result = apply_rounds(crops / 255, draws, only_due=True).mul(255)
    expected = [
        by_pillow(by_pillow(image, RandOperation.SOLARIZE, 100), RandOperation.CONTRAST, 0.3) for image in crops
    ]
    assert torch.equal(result.round().to(torch.uint8), torch.stack(expected))


def draw(group, samples=20_000):
    uniforms = np.random.default_rng(0).random((group.count, samples, num_uniforms(group)))
    return draw_operations(uniforms, group, size=group.size)


def test_operations_are_equally_likely_and_magnitudes_uniform():
    draws = draw(ViewGroup(size=32, rand_augment=2))[0, :, NUM_COLUMNS:]
    assert draws.shape == (20_000, 4)
    for first in (0, 2):
        operations, values = draws[:, first], draws[:, first + 1]
        assert chisquare(np.bincount(operations.astype(int), minlength=14)).pvalue > 1e-3
        for operation, (low, high) in RANGES.items():
            its_values = values[operations == operation]
            if operation == RandOperation.POSTERIZE:
                assert chisquare(np.unique(its_values, return_counts=True)[1]).pvalue > 1e-3
                assert sorted(set(its_values)) == [4, 5, 6, 7]
            elif low < high:
                assert ks_2samp(its_values, np.linspace(low, high, 5_001)).pvalue > 1e-3
            else:
                assert not its_values.any()
    joint = np.bincount((14 * draws[:, 0] + draws[:, 2]).astype(int), minlength=196)
    assert chisquare(joint).pvalue > 1e-3  # the rounds are independent, with replacement


def test_a_strong_view_is_flipped_and_moved_before_it_is_augmented_and_normalised():
    group = ViewGroup(size=16, rand_augment=2, cutout=(0.5, 0.5), **PLAIN)
    crops = images()[:8].repeat(5, 1, 1, 1)[None]
    draws = torch.from_numpy(draw(group, 40))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    views = apply_photometric(crops, draws, group, mean=mean, std=std)
    own = draws[0, :, NUM_COLUMNS:]
    plain = cut_out(apply_rounds(crops[0] / 255, own[:, :4], only_due=False), own[:, 4:])
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_close(views[0], expected, atol=1e-5, rtol=0)
    assert (plain == CUTOUT_LEVEL / 255).all(dim=1).flatten(1).any(dim=1).all()


def test_groups_without_it_draw_what_they_always_drew():
    group, strong = ViewGroup(size=8), ViewGroup(size=8, rand_augment=2, cutout=(0.5, 0.5))
    uniforms = np.random.default_rng(0).random((1, 5, num_uniforms(group)))
    plain = draw_operations(uniforms, group, size=8)
    assert plain.shape == (1, 5, NUM_COLUMNS)
    more = np.concatenate([uniforms, np.random.default_rng(1).random((1, 5, 7))], axis=-1)
    assert np.array_equal(draw_operations(more, strong, size=8)[..., :NUM_COLUMNS], plain)


def test_accelerators_never_wait_for_a_value():
    # the meta device holds no values: reading one, or a shape that depends on one, is an error there
    group = ViewGroup(size=8, rand_augment=2, cutout=(0.5, 0.5))
    image, draws = torch.empty(5, 3, 8, 8, device="meta"), torch.empty(5, num_draws(group), device="meta")
    (stages,) = stages_per_view(group, size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    augment_on_accelerator(image, draws, stages)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the check bites
        augment_on_cpu(image, draws, stages, out=torch.empty_like(image))


@pytest.mark.other
def test_the_accelerator_path_compiles_to_one_graph():
    group = ViewGroup(size=8, rand_augment=1, cutout=(0.5, 0.5), **PLAIN)
    draws = torch.from_numpy(draw(group, 30))[0]
    (stages,) = stages_per_view(group, size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    crops = images(8)[:1].repeat(30, 1, 1, 1)
    plain = torch.empty(crops.shape)
    augment_on_cpu(crops, draws, stages, out=plain)
    everywhere = torch.compile(augment_on_accelerator, backend="eager", fullgraph=True)
    assert_close(everywhere(crops, draws, stages), plain, atol=1e-5, rtol=0)
