"""Cutout: how large the square is, where it lies, and that it changes nothing else."""

import numpy as np
import pytest
import torch

from ssl_pipeline.augment.draw import draw_operations, num_uniforms
from ssl_pipeline.augment.operations.cutout import CUTOUT_LEVEL, cut_out
from ssl_pipeline.augment.views import ViewGroup
from tests.augment.columns import NUM_COLUMNS


def draw(group, samples=20_000):
    uniforms = np.random.default_rng(0).random((group.count, samples, num_uniforms(group)))
    return draw_operations(uniforms, group, size=group.size)[0, :, NUM_COLUMNS:]


def test_the_cutout_has_its_side_and_lies_anywhere():
    top, left, bottom, right = draw(ViewGroup(size=32, cutout=(0.5, 0.5))).T
    assert ((top >= 0) & (left >= 0) & (bottom <= 32) & (right <= 32)).all()
    assert set(bottom - top) == set(right - left) == set(range(9, 17))  # cut off where it reaches out
    assert np.mean((top > 0) & (top < 16)) == pytest.approx(15 / 32, abs=0.02)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.03


def test_a_range_of_cutouts_has_all_sides_from_none_on():
    top, _, bottom, _ = draw(ViewGroup(size=32, cutout=(0.0, 0.5))).T
    assert set(bottom - top) == set(range(17))


def test_cutout_paints_exactly_its_square_gray():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    image = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = image.clone()
    expected[0, :, 1:3, 2:6] = CUTOUT_LEVEL / 255
    assert torch.equal(cut_out(image, boxes), expected)
