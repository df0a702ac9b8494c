"""Near pairs: all of them exactly, and most of them by the index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_pipeline.config import ConfigError
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
