"""RandAugment and cutout against Pillow and torchvision, one image at a time."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chisquare, ks_2samp
from torch.testing import assert_close
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from ssl_pipeline.augment.draw import draw_parameters, draw_rand_augment
from ssl_pipeline.augment.on_accelerator import augment_everywhere
from ssl_pipeline.augment.on_cpu import augment_selected
from ssl_pipeline.augment.parameters import NUM_PARAMETERS, stages_per_view
from ssl_pipeline.augment.photometric import apply_photometric
from ssl_pipeline.augment.rand_augment import CUTOUT_LEVEL, RANGES, Operation, apply_rand_augment, cut_out
from ssl_pipeline.augment.views import UNIFORMS_PER_VIEW, ViewGroup

ENHANCERS = {
    Operation.BRIGHTNESS: (ImageEnhance.Brightness, torchvision.adjust_brightness),
    Operation.COLOUR: (ImageEnhance.Color, torchvision.adjust_saturation),
    Operation.CONTRAST: (ImageEnhance.Contrast, torchvision.adjust_contrast),
    Operation.SHARPNESS: (ImageEnhance.Sharpness, torchvision.adjust_sharpness),
}
GEOMETRIC = list(Operation)[Operation.ROTATE : Operation.TRANSLATE_Y + 1]
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
    if operation == Operation.POSTERIZE:
        return [4.0, 5.0, 6.0, 7.0]
    return [low] if low == high else [low, low + 0.31 * (high - low), (low + high) / 2, high - 1e-3]


def by_pillow(image_CHW, operation, magnitude):
    image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    width, height = image.size
    if operation in ENHANCERS:
        image = ENHANCERS[operation][0](image).enhance(magnitude)
    elif operation == Operation.ROTATE:
        image = image.rotate(math.degrees(magnitude))
    elif operation in GEOMETRIC:
        matrix = {
            Operation.SHEAR_X: (1, magnitude, 0, 0, 1, 0),
            Operation.SHEAR_Y: (1, 0, 0, magnitude, 1, 0),
            Operation.TRANSLATE_X: (1, 0, magnitude * width, 0, 1, 0),
            Operation.TRANSLATE_Y: (1, 0, 0, 0, 1, magnitude * height),
        }
        image = image.transform(image.size, Image.Transform.AFFINE, matrix[operation])
    elif operation == Operation.POSTERIZE:
        image = ImageOps.posterize(image, int(magnitude))
    elif operation == Operation.SOLARIZE:
        image = ImageOps.solarize(image, magnitude)
    elif operation == Operation.AUTOCONTRAST:
        image = ImageOps.autocontrast(image)
    elif operation == Operation.EQUALIZE:
        image = ImageOps.equalize(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def by_torchvision(image_CHW, operation, magnitude):
    size = image_CHW.shape[-1]
    if operation in ENHANCERS:
        return ENHANCERS[operation][1](image_CHW, magnitude)
    if operation in GEOMETRIC:
        angle = math.degrees(magnitude) if operation == Operation.ROTATE else 0.0
        # the other direction: torchvision moves the image, Pillow says where a pixel comes from
        shear = -math.degrees(math.atan(magnitude))
        turned_or_moved = {
            Operation.ROTATE: {"angle": -angle},
            Operation.SHEAR_X: {"shear": [-shear, 0.0], "center": [0, 0]},
            Operation.SHEAR_Y: {"shear": [0.0, -shear], "center": [0, 0]},
            Operation.TRANSLATE_X: {"translate": [-magnitude * size, 0.0]},
            Operation.TRANSLATE_Y: {"translate": [0.0, -magnitude * size]},
        }[operation]
        still = {"angle": 0.0, "translate": [0.0, 0.0], "scale": 1.0, "shear": [0.0, 0.0]}
        return torchvision.affine(
            image_CHW, **(still | turned_or_moved), interpolation=InterpolationMode.NEAREST, fill=0
        )
    if operation == Operation.POSTERIZE:
        return torchvision.posterize(image_CHW, int(magnitude))
    if operation == Operation.SOLARIZE:
        return torchvision.solarize(image_CHW, magnitude) if magnitude <= 255 else image_CHW  # it refuses more
    if operation == Operation.AUTOCONTRAST:
        return torchvision.autocontrast(image_CHW)
    if operation == Operation.EQUALIZE:
        return torchvision.equalize(image_CHW)
    return image_CHW


def rows(operation, values, repeats):
    """Parameters of one round: `operation` with each of the magnitudes, for `repeats` images each."""
    magnitude_N = torch.tensor(values).repeat_interleave(repeats)
    return torch.stack([torch.full_like(magnitude_N, operation), magnitude_N], dim=1)


def assert_equal_levels(actual, expected, *, levels, share):
    """At most `levels` apart, and different in at most `share` of the values."""
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() <= levels
    assert (difference > 0).float().mean() <= share


@pytest.mark.parametrize("selected", [True, False], ids=["selected", "everywhere"])
@pytest.mark.parametrize("size", [16, 31])
@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.name)
def test_each_operation_equals_pillow_and_torchvision(operation, size, selected):
    crops, values = images(size), magnitudes(operation)
    parameters = rows(operation, values, len(crops))
    image = crops.repeat(len(values), 1, 1, 1) / 255
    levels = apply_rand_augment(image, parameters, rounds=1, cutout=False, selected=selected).mul(255)
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
        rounded = (operation == Operation.AUTOCONTRAST, operation in ENHANCERS)
        assert_equal_levels(levels.round(), expected[0], levels=1, share=0.02 * rounded[0])
        assert_equal_levels(levels.round(), expected[1], levels=2, share=0.5 * rounded[1] + 0.02 * rounded[0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_images_go_through_every_operation(size):
    crops = torch.randint(0, 256, (len(Operation), 3, size, size), generator=torch.Generator().manual_seed(0))
    middle = [magnitudes(operation)[len(magnitudes(operation)) // 2] for operation in Operation]
    parameters = torch.tensor([[float(operation), middle[operation]] for operation in Operation])
    both = [
        apply_rand_augment(crops / 255, parameters, rounds=1, cutout=False, selected=selected)
        for selected in (True, False)
    ]
    assert_close(both[0], both[1], rtol=0, atol=0)
    assert both[0].isfinite().all()
    assert ((both[0] >= 0) & (both[0] <= 1)).all()


def test_two_rounds_are_one_after_the_other():
    crops = images()[:2]
    parameters = torch.tensor([[Operation.SOLARIZE, 100.0, Operation.CONTRAST, 0.3]]).repeat(2, 1)
    result = apply_rand_augment(crops / 255, parameters, rounds=2, cutout=False, selected=True).mul(255)
    expected = [by_pillow(by_pillow(image, Operation.SOLARIZE, 100), Operation.CONTRAST, 0.3) for image in crops]
    assert torch.equal(result.round().to(torch.uint8), torch.stack(expected))


def drawn(group, samples=20_000):
    uniforms = np.random.default_rng(0).random((group.count, samples, group.num_uniforms()))
    return draw_parameters(uniforms, group)[0, :, NUM_PARAMETERS:]


def test_operations_are_equally_likely_and_magnitudes_uniform():
    parameters = drawn(ViewGroup(size=32, rand_augment=2))
    assert parameters.shape == (20_000, 4)
    for first in (0, 2):
        operations, values = parameters[:, first], parameters[:, first + 1]
        assert chisquare(np.bincount(operations.astype(int), minlength=14)).pvalue > 1e-3
        for operation, (low, high) in RANGES.items():
            its_values = values[operations == operation]
            if operation == Operation.POSTERIZE:
                assert chisquare(np.unique(its_values, return_counts=True)[1]).pvalue > 1e-3
                assert sorted(set(its_values)) == [4, 5, 6, 7]
            elif low < high:
                assert ks_2samp(its_values, np.linspace(low, high, 5_001)).pvalue > 1e-3
            else:
                assert not its_values.any()
    joint = np.bincount((14 * parameters[:, 0] + parameters[:, 2]).astype(int), minlength=196)
    assert chisquare(joint).pvalue > 1e-3  # the rounds are independent, with replacement


def test_the_cutout_has_its_side_and_lies_anywhere():
    top, left, bottom, right = drawn(ViewGroup(size=32, cutout=(0.5, 0.5))).T
    assert ((top >= 0) & (left >= 0) & (bottom <= 32) & (right <= 32)).all()
    assert set(bottom - top) == set(right - left) == set(range(9, 17))  # cut off where it reaches out
    assert np.mean((top > 0) & (top < 16)) == pytest.approx(15 / 32, abs=0.02)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.03


def test_a_range_of_cutouts_has_all_sides_from_none_on():
    top, _, bottom, _ = drawn(ViewGroup(size=32, cutout=(0.0, 0.5))).T
    assert set(bottom - top) == set(range(17))


def test_cutout_paints_exactly_its_square_gray():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    image = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = image.clone()
    expected[0, :, 1:3, 2:6] = CUTOUT_LEVEL / 255
    assert torch.equal(cut_out(image, boxes), expected)


def test_a_strong_view_is_flipped_and_moved_before_it_is_augmented_and_normalised():
    group = ViewGroup(size=16, rand_augment=2, cutout=(0.5, 0.5), **PLAIN)
    uniforms = np.random.default_rng(0).random((1, 40, group.num_uniforms()))
    crops = images()[:8].repeat(5, 1, 1, 1)[None]
    parameters = torch.from_numpy(draw_parameters(uniforms, group))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    views = apply_photometric(crops, parameters, group, mean=mean, std=std)
    own = torch.from_numpy(draw_rand_augment(uniforms[..., UNIFORMS_PER_VIEW:], group))[0]
    plain = apply_rand_augment(crops[0] / 255, own, rounds=2, cutout=True, selected=False)
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_close(views[0], expected, atol=1e-5, rtol=0)
    assert (plain == CUTOUT_LEVEL / 255).all(dim=1).flatten(1).any(dim=1).all()


def test_groups_without_it_draw_what_they_always_drew():
    group = ViewGroup(size=8)
    assert group.num_uniforms() == UNIFORMS_PER_VIEW
    uniforms = np.random.default_rng(0).random((1, 5, UNIFORMS_PER_VIEW))
    assert draw_parameters(uniforms, group).shape == (1, 5, NUM_PARAMETERS)
    strong = ViewGroup(size=8, rand_augment=2, cutout=(0.5, 0.5))
    more = np.concatenate([uniforms, np.random.default_rng(1).random((1, 5, 7))], axis=-1)
    assert np.array_equal(draw_parameters(more, strong)[..., :NUM_PARAMETERS], draw_parameters(uniforms, group))


def test_accelerators_never_wait_for_a_value():
    # the meta device holds no values: reading one, or a shape that depends on one, is an error there
    group = ViewGroup(size=8, rand_augment=2, cutout=(0.5, 0.5))
    image, parameters = torch.empty(5, 3, 8, 8, device="meta"), torch.empty(5, NUM_PARAMETERS + 8, device="meta")
    stages = stages_per_view(group, mean=(0.5,) * 3, std=(0.25,) * 3)[0]
    augment_everywhere(image, parameters, stages)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the check bites
        augment_selected(image, parameters, stages, out=torch.empty_like(image))


def test_the_accelerator_path_compiles_to_one_graph():
    group = ViewGroup(size=8, rand_augment=1, cutout=(0.5, 0.5), **PLAIN)
    uniforms = np.random.default_rng(0).random((1, 30, group.num_uniforms()))
    parameters = torch.from_numpy(draw_parameters(uniforms, group))[0]
    stages = stages_per_view(group, mean=(0.5,) * 3, std=(0.25,) * 3)[0]
    crops = images(8)[:1].repeat(30, 1, 1, 1)
    plain = torch.empty(crops.shape)
    augment_selected(crops, parameters, stages, out=plain)
    everywhere = torch.compile(augment_everywhere, backend="eager", fullgraph=True)
    assert_close(everywhere(crops, parameters, stages), plain, atol=1e-5, rtol=0)
