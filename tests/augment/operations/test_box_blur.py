"""`blur: box` against Pillow, on both ways to compute, and what it leaves as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ssl_pipeline.augment.operations.blur import Blur, Kernel, box, box_width
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import ConfigError, validate

SIGMAS = (0.1, 0.5, 0.9, 1.0, 1.2, 1.4142, 1.5, 2.0, 3.5, 7.0)


def pillow(image_CHW: torch.Tensor, sigma: float) -> torch.Tensor:
    image = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(np.array(image.filter(ImageFilter.GaussianBlur(sigma)))).permute(2, 0, 1)


def images(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (len(SIGMAS), 3, size, size), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("way", ["on_cpu", "on_accelerator"])
@pytest.mark.parametrize("size", [5, 32])
def test_it_is_pillows_blur(way, size):
    crops = images(size)
    sigma_NP = torch.tensor(SIGMAS)[:, None]
    setting = Kernel("box", box_width(max(SIGMAS)))
    blurred = getattr(Blur(), way)(crops.float() / 255, sigma_NP, setting) * 255
    expected = torch.stack([pillow(crop, sigma) for crop, sigma in zip(crops, SIGMAS, strict=True)]).float()
    difference = (blurred - expected).abs()
    assert difference.max() < 1.001  # one level, where a sum lies halfway between two in Pillow's fixed point
    assert (difference > 1e-3).float().mean() < 0.05


@pytest.mark.parametrize("way", ["on_cpu", "on_accelerator"])
def test_views_that_are_not_blurred_stay_as_they_are(way):
    crops = images(8).float() / 255
    untouched = getattr(Blur(), way)(crops.clone(), torch.zeros(len(crops), 1), Kernel("box", 5))
    torch.testing.assert_close(untouched, crops, rtol=0, atol=0)


def test_the_boxes_have_the_variance_of_the_gaussian_and_sum_to_one():
    sigma_N = torch.tensor(SIGMAS, dtype=torch.float64)
    weights_NR = box(sigma_N, box_width(max(SIGMAS)) // 2)
    distance_R = torch.arange(weights_NR.shape[1])
    torch.testing.assert_close(2 * weights_NR.sum(1) - weights_NR[:, 0], torch.ones_like(sigma_N))
    torch.testing.assert_close(3 * 2 * (weights_NR * distance_R**2).sum(1), sigma_N**2)


def test_the_same_numbers_are_drawn_for_both_kinds():
    uniforms = np.random.default_rng(0).random((2, 16, 2))
    gaussian, boxes = (
        Blur().draw(uniforms, ViewGroup(count=2, size=32, blur_prob=0.5, blur=kind), size=32)
        for kind in ("gaussian", "box")
    )
    assert np.array_equal(gaussian, boxes)


def test_a_kernel_width_is_refused_with_boxes():
    with pytest.raises(ConfigError, match=r"blur_kernel must be left out with blur=box\. Got 23\."):
        validate(ViewGroup, {"size": 32, "blur": "box", "blur_kernel": 23})
