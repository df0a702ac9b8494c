"""The draws of official recipes' view groups are distributed as torchvision draws them for the official code."""

import collections
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import ColorJitter

from ssl_pipeline.augment.draw import draw_operations, num_uniforms
from ssl_pipeline.augment.operations.jitter import Adjustment
from ssl_pipeline.augment.views import ViewGroup
from tests.augment.columns import NUM_COLUMNS, Column

SAMPLES = 20_000
TURNS = slice(Column.TURN, Column.TURN + 4)
FACTORS = slice(Column.FACTOR, Column.FACTOR + 4)

# group, view, and of the official code: the ColorJitter, P(jitter), P(gray), P(blur), P(solarize)
DINO_GLOBAL = ViewGroup(count=2, size=224, scale=(0.4, 1.0), blur_prob=(1.0, 0.1), solarize_prob=(0.0, 0.2))
DINO_LOCAL = ViewGroup(count=8, size=96, scale=(0.05, 0.4), blur_prob=0.5)
SIMCLR = ViewGroup(count=2, size=224, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_prob=0.5)
OFFICIAL = {
    "dino global 1": (DINO_GLOBAL, 0, ColorJitter(0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 1.0, 0.0),
    "dino global 2": (DINO_GLOBAL, 1, ColorJitter(0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.1, 0.2),
    "dino local": (DINO_LOCAL, 7, ColorJitter(0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5, 0.0),
    "simclr": (SIMCLR, 1, ColorJitter(0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5, 0.0),
}


def draw(group, samples=SAMPLES):
    uniforms = np.random.default_rng(0).random((group.count, samples, num_uniforms(group)))
    return draw_operations(uniforms, group, size=group.size)


def assert_probability(hits, probability):
    spread = math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(np.mean(hits) - probability) <= 4 * spread


@pytest.mark.parametrize("name", OFFICIAL)
def test_probabilities_are_the_official_ones(name):
    group, view, _, jitter, gray, blur, solarize = OFFICIAL[name]
    drawn = draw(group)[view]
    assert_probability(drawn[:, Column.JITTER] == 1, jitter)
    assert_probability(drawn[:, Column.GRAY] == 1, gray)
    assert_probability(drawn[:, Column.BLUR_SIGMA] > 0, blur)
    assert_probability(drawn[:, Column.SOLARIZE] == 1, solarize)


@pytest.mark.parametrize("name", OFFICIAL)
def test_factors_and_orders_are_distributed_as_color_jitter_draws_them(name):
    group, view, jitter, *_ = OFFICIAL[name]
    drawn = draw(group)[view]
    torch.manual_seed(0)
    theirs = [
        ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(2_000)
    ]
    bounds = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    for operation, (low, high) in zip(Adjustment, bounds, strict=True):
        factors = drawn[:, FACTORS][:, operation]
        assert low - 1e-6 <= factors.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < factors.max() <= high + 1e-6
        assert ks_2samp(factors, [row[1 + operation] for row in theirs]).pvalue > 1e-3
    orders = collections.Counter(map(tuple, np.argsort(drawn[:, TURNS], axis=1).tolist()))
    assert set(orders) == {tuple(row[0].tolist()) for row in theirs}
    assert chisquare(list(orders.values())).pvalue > 1e-3


def test_sigmas_are_uniform():
    sigmas = draw(DINO_GLOBAL)[0, :, Column.BLUR_SIGMA]
    assert ks_2samp(sigmas, np.linspace(0.1, 2.0, 20_001)).pvalue > 1e-3


def test_what_is_drawn_for_one_purpose_says_nothing_about_another():
    group = ViewGroup(size=32, blur_prob=0.5, solarize_prob=0.5, jitter_prob=0.5, gray_prob=0.5)
    drawn = draw(group)[0]
    columns = [column for column in range(NUM_COLUMNS) if column not in range(TURNS.start, TURNS.stop)]
    correlation = np.corrcoef(drawn[:, columns].T) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / math.sqrt(SAMPLES)


def test_a_strength_above_one_does_not_reach_negative_factors():
    drawn = draw(ViewGroup(size=32, brightness=1.8), samples=2_000)[0, :, Column.FACTOR]
    assert drawn.min() >= 0
    assert drawn.max() > 2.7


def test_draws_are_small_and_the_same_for_the_same_uniforms():
    first, second = draw(DINO_LOCAL, samples=5), draw(DINO_LOCAL, samples=5)
    assert first.dtype == np.float32
    assert first.shape == (8, 5, NUM_COLUMNS)
    assert np.array_equal(first, second)
