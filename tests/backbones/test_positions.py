"""Position tables against a loop and against the official DINO's resampling."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssl_pipeline.backbones.positions import resample_positions, sincos_position_embedding


def test_sincos_positions_equal_the_loop():
    dim, rows, columns = 8, 2, 3
    table = sincos_position_embedding(dim, (rows, columns), class_token=True)
    expected = [[0.0] * dim]
    for row in range(rows):
        for column in range(columns):
            entry = []
            for position in (column, row):
                angles = [position / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                entry += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            expected.append(entry)
    torch.testing.assert_close(table, torch.tensor(expected))
    assert torch.equal(sincos_position_embedding(dim, (rows, columns), class_token=False), table[1:])
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_position_embedding(6, (2, 2), class_token=False)


@pytest.mark.parametrize("new", [(6, 6), (9, 14), (20, 17)])
def test_positions_are_resampled_as_the_official_dino_does(new):
    table = torch.randn(1, 14 * 14, 5, dtype=torch.float64, requires_grad=True)
    scale = tuple((side + 0.1) / 14 for side in new)
    expected = F.interpolate(table.view(1, 14, 14, 5).permute(0, 3, 1, 2), scale_factor=scale, mode="bicubic")
    expected = expected.permute(0, 2, 3, 1).flatten(1, 2)
    actual = resample_positions(table, (14, 14), new)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    gradients = [torch.autograd.grad((result * weights).sum(), table)[0] for result in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_positions_of_the_same_grid_are_left_alone():
    table = torch.randn(1, 12, 5)
    assert resample_positions(table, (3, 4), (3, 4)) is table


def test_positions_stay_in_full_precision_under_autocast():
    table = torch.randn(1, 16, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = resample_positions(table, (4, 4), (3, 3))
    assert torch.equal(inside, resample_positions(table, (4, 4), (3, 3)))
