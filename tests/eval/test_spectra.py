import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ssl_pipeline.eval import spectra
from ssl_pipeline.eval.spectra import alignment, alpha_req, feature_std, lidar, rankme, uniformity
from ssl_pipeline.methods.base import feature_std as logged_feature_std


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rank_of(values: list[float], eps: float) -> float:
    shares = [value / sum(values) + eps for value in values]
    return math.exp(-sum(p * math.log(p) for p in shares if p))


def test_rankme_counts_the_directions_that_features_use() -> None:
    assert rankme(torch.eye(5)) == pytest.approx(5, abs=1e-4)
    assert rankme(torch.ones(6, 4)) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), eps=0) == pytest.approx(4 / 27**0.25)
    assert rankme(torch.zeros(3, 2)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", [(40, 6), (5, 9)])
def test_rankme_is_that_of_the_loop(shape: tuple[int, int]) -> None:
    features = random(*shape) + 2
    values = np.linalg.svd(features.double().numpy(), compute_uv=False).tolist()
    assert len(values) == min(shape)
    assert rankme(features) == pytest.approx(rank_of(values, 1e-7), rel=1e-10)


def slope_in_loops(features: torch.Tensor, lo: int, hi: int) -> float:
    """Weighted least squares by its normal equations, on the eigenvalues of numpy's covariance."""
    values = sorted(np.linalg.eigvalsh(np.cov(features.double().numpy().T)).tolist(), reverse=True)
    points = [
        (-math.log(rank), math.log(value / sum(values)), 1 / rank)
        for rank, value in enumerate(values, start=1)
        if lo < rank <= hi
    ]
    w, wx, wy = (
        sum(weight * part for part, weight in parts)
        for parts in zip(*(((1, weight), (x, weight), (y, weight)) for x, y, weight in points), strict=True)
    )
    wxx = sum(weight * x * x for x, _, weight in points)
    wxy = sum(weight * x * y for x, y, weight in points)
    return (w * wxy - wx * wy) / (w * wxx - wx * wx)


@pytest.mark.parametrize(("lo", "hi"), [(3, 100), (0, 5), (2, 8)])
def test_alpha_is_that_of_the_loop(lo: int, hi: int) -> None:
    features = random(60, 12) * torch.arange(1, 13).float() ** -0.5 + 3
    assert alpha_req(features, lo=lo, hi=hi) == pytest.approx(slope_in_loops(features, lo, hi), rel=1e-9)


def test_alpha_is_the_exponent_of_a_power_law() -> None:
    directions = torch.linalg.qr(random(200, 50).double() - random(200, 50).double().mean(dim=0))[0]
    directions = torch.linalg.qr(directions - directions.mean(dim=0))[0]
    features = directions * torch.arange(1, 51).double() ** (-1.3 / 2)
    assert alpha_req(features) == pytest.approx(1.3, abs=0.02)


def test_few_images_have_the_eigenvalues_that_are_not_zero() -> None:
    features = random(9, 40)
    kept = features.double() @ torch.linalg.svd(features.double() - features.double().mean(dim=0))[2][:8].T
    assert alpha_req(features) == pytest.approx(slope_in_loops(kept, 3, 100), rel=1e-6)


def test_lidar_is_that_of_the_loop() -> None:
    embeddings = random(12, 3, 5) + 4 * random(12, 1, 5, seed=1) * torch.tensor([1.0, 1.0, 0.3, 0.1, 0.0])
    points = embeddings.double().numpy()
    between, within = np.zeros((5, 5)), np.zeros((5, 5))
    means = points.mean(axis=1)
    for image in range(12):
        difference = means[image] - means.mean(axis=0)
        between += np.outer(difference, difference) / 11
        for view in range(3):
            difference = points[image, view] - means[image]
            within += np.outer(difference, difference) / (12 * 2)
    values, vectors = np.linalg.eigh(within + 1e-4 * np.eye(5))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    expected = rank_of(np.linalg.eigvalsh(root @ between @ root).tolist(), 1e-8)
    assert lidar(embeddings) == pytest.approx(expected, rel=1e-8)
    assert lidar(embeddings.repeat(1, 1, 2)) < 6, "copies of dimensions are no new ones"


def test_half_precision_is_computed_in_double() -> None:
    features = random(30, 8).bfloat16()
    assert rankme(features) == rankme(features.double())
    assert alpha_req(features) == alpha_req(features.double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rankme(random(3)), r"rankme needs features with 2 axes and no empty one\. Got shape \(3,\)"),
        (lambda: rankme(torch.empty(0, 3)), "no empty one"),
        (lambda: rankme(torch.full((2, 2), torch.nan)), "rankme needs finite features"),
        (lambda: alpha_req(random(50, 4)), "two eigenvalues or more of the ranks 4 to 100"),
        (lambda: alpha_req(torch.ones(50, 9)), "have 0 in all"),
        (lambda: alpha_req(torch.full((50, 9), 0.1)), "have 0 in all"),
        (lambda: lidar(random(3, 4)), "lidar needs features with 3 axes"),
        (lambda: lidar(random(3, 1, 4)), r"two views of each\. Got \(3, 1, 4\)"),
    ],
)
def test_what_has_no_spectrum_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_uniformity_is_that_of_the_loop_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "ROWS_AT_ONCE", 7)
    features = random(20, 5)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(20) for j in range(i)]
    assert uniformity(features) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-10)


def test_uniformity_is_zero_for_one_point_and_lowest_for_opposite_ones() -> None:
    assert uniformity(torch.ones(6, 4)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.zeros(6, 4)) == 0, "a full collapse"
    assert uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-8)


def test_alignment_by_hand() -> None:
    first, second = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    assert alignment(first, second).tolist() == pytest.approx([0.0, 2.0])
    assert alignment(first, second, power=1).tolist() == pytest.approx([0.0, math.sqrt(2)])


def test_the_deviation_is_what_methods_log() -> None:
    features = random(50, 8) + 1
    assert feature_std(features) == pytest.approx(logged_feature_std(features).item(), rel=1e-5)


@pytest.mark.parametrize("measure", [uniformity, feature_std, lambda x: alignment(x, x)])
def test_features_on_the_sphere_must_be_finite(measure: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(ValueError, match="finite"):
        measure(torch.full((4, 3), torch.nan))


def test_two_features_and_views_of_the_same_images_are_needed() -> None:
    with pytest.raises(ValueError, match="two features or more"):
        uniformity(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"the same images. Got \(2, 3\) and \(3, 3\)"):
        alignment(torch.ones(2, 3), torch.ones(3, 3))


def test_lidar_of_few_images_is_that_of_the_definition() -> None:
    """Fewer images than dimensions: the zeros among the eigenvalues count as they do in the formula."""
    embeddings = random(5, 3, 12).double()
    means = embeddings.mean(dim=1)
    within = (embeddings - means[:, None]).flatten(0, 1)
    sw = (within.T @ within / 10 + 1e-4 * torch.eye(12)).numpy()
    values, vectors = np.linalg.eigh(sw)
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(whiten @ np.cov(means.numpy().T) @ whiten).clip(min=0)
    assert lidar(embeddings) == pytest.approx(rank_of(eigenvalues.tolist(), 1e-8), rel=1e-6)
