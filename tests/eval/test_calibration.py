"""The calibration error against numbers that a reader can check, and against a loop."""

from __future__ import annotations

import pytest
import torch

from ssl_pipeline.eval.calibration import expected_calibration_error


def test_ten_sure_images_of_which_six_are_right_are_thirty_percent_off():
    confidence, right = torch.full((10,), 0.9), torch.arange(10) < 6
    assert expected_calibration_error(confidence, right) == pytest.approx(30.0, abs=1e-4)


def test_bins_that_err_both_ways_do_not_cancel():
    confidence = torch.tensor([0.9] * 10 + [0.4] * 10)
    right = torch.tensor([True] * 7 + [False] * 3 + [True] * 6 + [False] * 4)
    assert expected_calibration_error(confidence, right) == pytest.approx(20.0, abs=1e-4)


def test_it_is_the_loop_over_bins():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(200, generator=generator, dtype=torch.float64)
    right = torch.rand(200, generator=generator) < 0.6
    expected = 0.0
    for number in range(7):
        inside = (confidence > number / 7) & (confidence <= (number + 1) / 7)
        if inside.any():
            expected += inside.float().mean().item() * abs(
                right[inside].double().mean().item() - confidence[inside].mean().item()
            )
    assert expected_calibration_error(confidence, right, bins=7) == pytest.approx(100 * expected, rel=1e-6)


def test_a_probability_of_one_lies_in_the_last_bin_and_of_zero_in_the_first():
    assert expected_calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 0.0


def test_without_images_it_is_an_error():
    with pytest.raises(ValueError, match=r"needs confidence \(N,\) and right \(N,\), N >= 1"):
        expected_calibration_error(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
