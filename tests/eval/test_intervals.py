"""Intervals: numbers from the formula, what resamples say, and a width where every image is right."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_pipeline.eval.intervals import (
    bootstrap_interval,
    intervals_overlap,
    mean_interval,
    resampled_interval,
    share_interval,
)


@pytest.mark.parametrize(
    ("percent", "num_images", "expected"),
    [
        (50.0, 100, (40.3832, 59.6168)),  # (0.5 + 0.019207 -+ 1.96 sqrt(0.0025 + 0.000096)) / 1.038415
        (100.0, 50, (92.8652, 100.0)),  # 50 / (50 + 1.96^2)
        (0.0, 50, (0.0, 7.1348)),
        (100.0, 1, (20.6543, 100.0)),
    ],
)
def test_the_interval_of_a_share_is_wilsons(percent: float, num_images: int, expected: tuple[float, float]) -> None:
    assert share_interval(percent, num_images) == pytest.approx(expected, abs=1e-3)


def test_it_covers_the_true_share_in_about_95_of_100_sets() -> None:
    generator = np.random.default_rng(0)
    for share, num_images in product((0.02, 0.5, 0.9, 0.99), (50, 400)):
        hits = generator.binomial(num_images, share, size=2000)
        found = [share_interval(100 * count / num_images, num_images) for count in hits.tolist()]
        covered = np.mean([low <= 100 * share <= high for low, high in found])
        assert 0.9 < covered <= 0.99


@pytest.mark.parametrize(("hits", "num_images"), [(30, 40), (300, 400), (120, 200)])
def test_it_is_near_that_of_many_resamples(hits: int, num_images: int) -> None:
    right = np.arange(num_images) < hits
    draws = np.random.default_rng(0).integers(num_images, size=(20_000, num_images))
    expected = np.quantile(right[draws].mean(axis=1), (0.025, 0.975)) * 100
    assert share_interval(100 * hits / num_images, num_images) == pytest.approx(expected, abs=200 / num_images)


def test_a_mean_of_hits_is_a_share() -> None:
    assert mean_interval(torch.tensor([100.0] * 7 + [0.0] * 3)) == share_interval(70.0, 10)
    low, high = mean_interval(torch.tensor([100.0] * 50))
    assert (low, high) == share_interval(100.0, 50)
    assert low < high


def test_what_no_resample_changes_has_the_width_of_a_share() -> None:
    assert mean_interval(torch.full((20,), 50.0)) == share_interval(50.0, 20)
    assert resampled_interval(lambda chosen_N: 100.0, 20) == share_interval(100.0, 20)
    assert resampled_interval(lambda chosen_N: 100.0, 20, counted_as=5.5) == share_interval(100.0, 5.5)


def test_means_have_the_bootstraps_interval_and_the_same_again() -> None:
    values = torch.linspace(0, 1, 400, dtype=torch.float64)

    def mean_of(chosen_N: torch.Tensor) -> float:
        return values[chosen_N].mean().item()

    deviation = values.std().item() / 20
    expected = (0.5 - 1.96 * deviation, 0.5 + 1.96 * deviation)
    found = [of() for of in (lambda: bootstrap_interval(values), lambda: resampled_interval(mean_of, 400))]
    for interval in (*found, mean_interval(values)):
        assert interval == pytest.approx(expected, abs=0.2 * deviation)
    assert bootstrap_interval(values) == found[0]
    assert resampled_interval(mean_of, 400) == found[1]


def test_two_figures_may_differ_by_chance_where_their_intervals_meet() -> None:
    assert intervals_overlap((90.0, 95.0), (95.0, 97.0))
    assert intervals_overlap((90.0, 99.0), (95.0, 97.0))
    assert not intervals_overlap((90.0, 94.0), (95.0, 97.0))
    assert not intervals_overlap((90.0, 94.0), None)


def test_no_evaluator_has_an_interval_of_its_own() -> None:
    rooms = Path(__file__).parents[2] / "ssl_pipeline" / "eval"
    own = [path.name for path in rooms.rglob("*.py") if "0.975" in path.read_text(encoding="utf-8")]
    assert own == ["intervals.py"]
