"""Position tables against a loop and against the official DINO's resampling."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl_pipeline.backbones.positions import resample_positions, sincos_position_embedding
from ssl_pipeline.config import ConfigError
from tests.backbones.tiny_vit import tiny_vit


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


def test_sincos_positions_of_moco_v3_begin_with_the_row():
    dim, side = 8, 3
    # the official code: meshgrid of widths and heights without a word on indexing, so the slow axis is called width
    slow, fast = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim // 4))
    angles = [np.outer(axis.flatten(), omega) for axis in (slow, fast)]
    expected = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    table = sincos_position_embedding(dim, (side, side), class_token=True, first_half="row")
    torch.testing.assert_close(table[1:], torch.from_numpy(expected).float())
    assert not table[0].any()


def test_the_two_orders_are_each_others_halves():
    column, row = (
        sincos_position_embedding(8, (2, 3), class_token=False, first_half=half) for half in ("column", "row")
    )
    assert torch.equal(row, column.roll(4, dims=1))
    assert not torch.equal(row, column)
    with pytest.raises(ValueError, match="must be 'column' or 'row'"):
        sincos_position_embedding(8, (2, 3), class_token=False, first_half="rows")


@pytest.mark.parametrize(("initial_weights", "half"), [(None, "column"), ("mae", "column"), ("moco_v3", "row")])
def test_fixed_positions_have_the_order_of_their_method(initial_weights, half):
    model = tiny_vit(fixed_positions=True, initial_weights=initial_weights).model
    expected = sincos_position_embedding(48, (4, 4), class_token=True, first_half=half)
    assert torch.equal(model.pos_embed[0], expected)
    assert not model.pos_embed.requires_grad


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


def test_fixed_positions_of_a_width_without_quarters_name_the_settings():
    with pytest.raises(ConfigError, match=r"backbone\.fixed_positions needs .* multiple of 4.* Got 18"):
        tiny_vit(fixed_positions=True, arguments={"embed_dim": 18, "num_heads": 3})
