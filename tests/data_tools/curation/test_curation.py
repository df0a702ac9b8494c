"""The pieces of curation on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import torch

from ssl_pipeline.data_tools.curation.groups import Groups, best_of_each
from ssl_pipeline.data_tools.curation.hierarchy import (
    balanced_sample,
    hierarchical_clusters,
    nearest_of_each,
    shares,
)
from ssl_pipeline.data_tools.curation.retrieval import retrieve


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def loop_groups(num_images: int, pairs: list[tuple[int, int]]) -> list[int]:
    """Union-find as in a textbook."""
    parent = list(range(num_images))

    def root(image: int) -> int:
        while parent[image] != image:
            image = parent[image]
        return image

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    return [root(image) for image in range(num_images)]


def test_pairs_in_parts_join_like_a_union_find():
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, 60, (50, 2))
    groups = Groups(60)
    for part in np.split(pairs, [1, 7, 30]):
        groups.join(part[:, 0], part[:, 1])
    assert groups.number_of.tolist() == loop_groups(60, [(int(a), int(b)) for a, b in pairs])
    sizes = [len(group) for group in groups.members()]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) == 2


def test_the_best_of_each_group_stays_and_of_equal_ones_the_first():
    number_of = numbers(0, 0, 2, 0, 2, 5)
    quality = np.array([[4, 9], [8, 1], [3, 3], [8, 2], [3, 3], [1, 1]])
    assert best_of_each(number_of, quality).tolist() == [2, 3, 5]


def test_shares_are_equal_but_for_those_that_have_less():
    assert shares(numbers(100, 3, 50), 23).tolist() == [10, 3, 10]
    assert shares(numbers(100, 3, 50), 24).tolist() == [11, 3, 10]
    assert shares(numbers(2, 2), 9).tolist() == [2, 2]
    assert shares(numbers(5, 5, 5), 2).tolist() == [1, 1, 0]


def test_the_nearest_of_each_cluster():
    near = np.array([0.9, 0.2, 0.5, 0.8, 0.1], dtype=np.float32)
    assert nearest_of_each(numbers(1, 0, 1, 1, 0), near, 1).tolist() == [0, 1]
    assert nearest_of_each(numbers(1, 0, 1, 1, 0), near, 2).tolist() == [0, 1, 3, 4]


def test_a_rare_concept_is_as_frequent_as_a_common_one_afterwards():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[[0, 1, 2, 3]]
    counts = (400, 40, 30, 30)
    features = torch.cat(
        [
            centre + 0.05 * torch.randn(count, 8, generator=generator)
            for centre, count in zip(centres, counts, strict=True)
        ]
    )
    levels = hierarchical_clusters(features, (24, 4), seed=0, rounds=3, nearest=3)
    assert [len(level) for level in levels] == [500, 24]
    concept = np.repeat(np.arange(4), counts)
    chosen = balanced_sample(levels, 100, seed=0)
    assert len(np.unique(chosen)) == 100
    assert np.bincount(concept[chosen]).tolist() == [25, 25, 25, 25]
    assert balanced_sample(levels, 100, seed=0).tolist() == chosen.tolist()
    assert balanced_sample(levels, 100, seed=1).tolist() != chosen.tolist()


def test_retrieval_in_parts_finds_what_a_loop_finds():
    generator = torch.Generator().manual_seed(0)
    pool, seeds = torch.randn(50, 6, generator=generator), torch.randn(7, 6, generator=generator)
    similarity, found = retrieve(pool, seeds, k=4, rows=8)
    for seed, row, values in zip(seeds, found, similarity, strict=True):
        cosines = torch.cosine_similarity(pool, seed[None])
        assert row.tolist() == cosines.argsort(descending=True)[:4].tolist()
        torch.testing.assert_close(values, cosines[row])
    assert retrieve(pool[:3], seeds, k=4)[1].shape == (7, 3)
