"""Near pairs: all of them exactly, and most of them by the index."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_pipeline.config import ConfigError
from ssl_pipeline.eval.search import near_pairs as near_pairs_module
from ssl_pipeline.eval.search.near_pairs import near_pairs, nearest_of


def with_copies(count: int, dim: int = 32) -> Tensor:
    """Random directions, and near each of the first 40 a second one."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, dim, generator=generator)
    return torch.cat([features, 3 * features[:40] + 0.3 * torch.randn(40, dim, generator=generator)])


def found_by(features: Tensor, **settings: object) -> dict[tuple[int, int], float]:
    parts = list(near_pairs(features, threshold=0.9, **settings))  # type: ignore[arg-type]
    rows = [
        row for part in parts for row in zip(part.first.tolist(), part.second.tolist(), part.similarity, strict=True)
    ]
    assert len({(first, second) for first, second, _ in rows}) == len(rows)
    return {(first, second): float(similarity) for first, second, similarity in rows}


def in_a_loop(features: Tensor) -> dict[tuple[int, int], float]:
    cosines = torch.cosine_similarity(features[:, None], features[None], dim=2)
    near = (cosines >= 0.9).triu(1).nonzero().tolist()
    return {(first, second): float(cosines[first, second]) for first, second in near}


@pytest.mark.parametrize("tile", [7, 64, 4096])
def test_every_pair_is_found_once_whatever_the_tile(tile):
    features = with_copies(100)
    expected = in_a_loop(features)
    found = found_by(features, search="exact", tile=tile)
    assert found.keys() == expected.keys()
    assert set(found) >= {(image, 100 + image) for image in range(40)}
    assert all(abs(found[pair] - expected[pair]) < 1e-5 for pair in expected)


def test_the_index_finds_nearly_all_pairs_and_nothing_else():
    features = with_copies(3000)
    exact, indexed = found_by(features, search="exact"), found_by(features, search="ivf")
    assert set(indexed) <= set(exact)
    assert len(indexed) >= 0.9 * len(exact)
    assert all(abs(indexed[pair] - exact[pair]) < 1e-5 for pair in indexed)


def test_a_pair_whose_images_name_each_other_is_told_once(monkeypatch):
    features = with_copies(3000)
    whole = found_by(features, search="ivf")
    parts = near_pairs_module.parts_of
    monkeypatch.setattr(near_pairs_module, "parts_of", lambda count, size=300: parts(count, min(size, 300)))
    assert found_by(features, search="ivf") == whole


def clustered_with_copies(count: int, dim: int) -> tuple[Tensor, set[tuple[int, int]]]:
    """Images of 2,000 subjects, at random places; and the pairs of 0.9 and more among an image and its copies.

    Those of a subject are alike by cosines of 0.5 to 0.8, and a twentieth of them have two copies of 0.92 to 0.99.
    """
    generator = np.random.default_rng(0)
    originals = count * 10 // 11
    copies = originals // 20
    subject = generator.integers(2000, size=originals)
    spread = generator.uniform(0.5, 1.0, size=2000).astype(np.float32)[subject, None] / np.sqrt(dim)
    centres = normalize(generator.standard_normal((2000, dim), dtype=np.float32))
    images = normalize(centres[subject] + spread * generator.standard_normal((originals, dim), dtype=np.float32))
    copied = generator.choice(originals, copies, replace=False)
    cosine = generator.uniform(0.92, 0.99, size=(2, copies, 1)).astype(np.float32)
    noise = np.sqrt(1 / cosine**2 - 1) / np.sqrt(dim) * generator.standard_normal((2, copies, dim), dtype=np.float32)
    near = normalize(images[copied] + noise)
    place = generator.permutation(originals + 2 * copies)
    features = np.empty((len(place), dim), np.float32)
    features[place] = np.concatenate([images, *near])
    same = np.stack([place[copied], *np.split(place[originals:], 2)])
    pairs = np.concatenate([same[[0, 1]], same[[0, 2]], same[[1, 2]]], axis=1)
    similar = (features[pairs[0]] * features[pairs[1]]).sum(axis=1) >= 0.9
    return torch.from_numpy(features), set(map(tuple, np.sort(pairs[:, similar], axis=0).T.tolist()))


def normalize(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.linalg.norm(rows_ND, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("count", "dim"), [(6_000, 64), pytest.param(200_000, 128, marks=pytest.mark.slow)], ids=["6,000", "200,000"]
)
def test_the_index_finds_copies_among_images_of_the_same_subjects(count, dim):
    features, planted = clustered_with_copies(count, dim)
    assert count - 3 <= len(features) <= count
    assert len(planted) > count / 12
    began = time.process_time()
    indexed = found_by(features, search="ivf")
    recall = len(planted & indexed.keys()) / len(planted)
    others = len(indexed.keys() - planted)
    print(f"\nrecall {recall:.3%} of {len(planted):,} pairs, {others} others, {time.process_time() - began:.0f} s")
    assert recall >= 0.97
    assert others <= 0.001 * len(planted), "images of one subject are no copies"


def test_features_may_be_float16_and_are_refused_if_not_finite():
    features = with_copies(50)
    assert found_by(features.half(), search="exact").keys() == in_a_loop(features.half().float()).keys()
    features[3, 1] = float("nan")
    with pytest.raises(ConfigError, match="NaN or infinite"):
        found_by(features, search="exact")


def test_nearest_of_another_set():
    features, others = with_copies(50), torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    similarity, numbers = nearest_of(features, others)
    cosines = torch.cosine_similarity(features[:, None], others[None], dim=2)
    np.testing.assert_array_equal(numbers, cosines.argmax(dim=1))
    torch.testing.assert_close(similarity, cosines.amax(dim=1))
