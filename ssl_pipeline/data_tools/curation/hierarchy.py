"""Hierarchical k-means and balanced sampling from it (Vo et al., 2024, https://arxiv.org/abs/2405.15613).

k-means puts its clusters where the images are dense: of a large concept it makes many. Clusters of clusters are spread
more evenly, and more so where each level is trained only on the images nearest to its centroids; an equal share for
each branch of the tree then makes rare concepts as frequent as common ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.eval.search.near_pairs import parts_of, unit_rows
from ssl_pipeline.randomness import SPLIT, generate_uniforms, hash64, permutation

Numbers = NDArray[np.int64]

ITERATIONS = 20
MOST_PER_CENTROID = 256  # images that k-means is trained on; more move no centroid
MOST_SPREAD, ROWS_PER_START = 10_000, 8  # clusters that k-means++ begins; for more the first rows are drawn at random

# Axes: N images (or clusters of the level below), K clusters, D feature dimensions.


def hierarchical_clusters(
    features_ND: Tensor, counts: Sequence[int], *, seed: int, rounds: int, nearest: int
) -> list[Numbers]:
    """For each level the cluster of each image, (N,), then the cluster of each cluster of the level below, and so on.

    counts: clusters of each level, falling. In each of `rounds` k-means starts again on the `nearest` rows of each
    cluster, which are spread more evenly than all rows.
    """
    levels: list[Numbers] = []
    rows_ND = features_ND
    for level, count in enumerate(counts):
        key = int(hash64(seed, SPLIT, level)) % 2**31
        centroids_KD = kmeans(_drawn(rows_ND, MOST_PER_CENTROID * count, key), count, seed=key)
        for number in range(rounds):
            cluster_N, similarity_N = assign(rows_ND, centroids_KD)
            close = nearest_of_each(cluster_N, similarity_N, nearest)
            if len(close) >= count:
                centroids_KD = kmeans(unit_rows(rows_ND, close), count, seed=key + number + 1)
        levels.append(assign(rows_ND, centroids_KD)[0])
        rows_ND = centroids_KD
    return levels


def kmeans(rows_ND: Tensor, count: int, *, seed: int) -> Tensor:
    """Centroids (K, D) of length 1, by FAISS's spherical k-means; it begins as k-means++ does."""
    import faiss

    model = faiss.Kmeans(
        rows_ND.shape[1],
        count,
        niter=ITERATIONS,
        seed=seed % 2**31,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=MOST_PER_CENTROID,
    )
    rows = rows_ND.contiguous()
    first_KD = _spread_rows(rows, count, seed=seed) if count <= MOST_SPREAD else None
    model.train(rows.numpy(), init_centroids=None if first_KD is None else first_KD.numpy())
    assert model.centroids is not None
    return torch.from_numpy(model.centroids.copy())


def _spread_rows(rows_ND: Tensor, count: int, *, seed: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): rows to begin with (K, D), each drawn by its squared distance to
    those before it. Of many rows some are drawn first."""
    rows_ND = rows_ND[torch.from_numpy(permutation(len(rows_ND), seed)[: ROWS_PER_START * count])]
    draws_K = generate_uniforms(hash64(seed, SPLIT), count)
    chosen = [int(draws_K[0] * len(rows_ND))]
    distance_N = torch.full((len(rows_ND),), torch.inf, dtype=torch.float64)
    for draw in draws_K[1:]:
        distance_N = torch.minimum(distance_N, 2 - 2 * (rows_ND @ rows_ND[chosen[-1]]).double()).clamp(min=0)
        up_to_N = distance_N.cumsum(0)
        place = int(torch.searchsorted(up_to_N, float(draw) * up_to_N[-1], right=True))
        chosen.append(min(place, len(rows_ND) - 1))
    return rows_ND[chosen]


def assign(rows_ND: Tensor, centroids_KD: Tensor) -> tuple[Numbers, NDArray[np.float32]]:
    """The nearest centroid of each row (N,), and the cosine similarity to it."""
    import faiss

    index = faiss.IndexFlatIP(centroids_KD.shape[1])
    index.add(centroids_KD.contiguous().numpy())
    found = [index.search(unit_rows(rows_ND, part).numpy(), 1) for part in parts_of(len(rows_ND))]
    return np.concatenate([near[:, 0] for _, near in found]), np.concatenate([similar[:, 0] for similar, _ in found])


def nearest_of_each(cluster_N: Numbers, similarity_N: NDArray[np.float32], count: int) -> Numbers:
    """Of each cluster the `count` rows nearest to its centroid, or all of a smaller one, ascending."""
    order_N = np.lexsort((-similarity_N, cluster_N))
    starts_N = np.flatnonzero(np.diff(cluster_N[order_N], prepend=-1))
    place_N = np.arange(len(order_N)) - np.repeat(starts_N, np.diff(np.append(starts_N, len(order_N))))
    return np.sort(order_N[place_N < count])


def shares(sizes_K: Numbers, total: int) -> Numbers:
    """How many of `total` each cluster gives, (K,): the same number each, or all of a smaller cluster.

    min(size, n) with the n that adds up to `total`; the first clusters that can give one more to make it exact.
    """
    total = min(total, int(sizes_K.sum()))
    ascending = np.sort(sizes_K)
    before = np.concatenate(([0], np.cumsum(ascending)))
    level = 0
    for number, size in enumerate(ascending.tolist()):
        level = (total - int(before[number])) // (len(ascending) - number)
        if level < size:
            break
    given_K = np.minimum(sizes_K, level)
    more = np.flatnonzero(sizes_K > given_K)[: total - int(given_K.sum())]
    given_K[more] += 1
    return given_K


def balanced_sample(levels: Sequence[Numbers], total: int, *, seed: int) -> Numbers:
    """Numbers of `total` images, ascending: equal shares for the clusters of the top level, in each of them for its
    clusters, and so on; within a cluster of the lowest level at random."""
    return np.sort(_sample(np.arange(len(levels[0])), list(levels), total, seed))


def _sample(images: Numbers, levels: list[Numbers], total: int, seed: int) -> Numbers:
    """`total` of some images, balanced over the clusters of the top level that they are in."""
    if total >= len(images):
        return images
    if not levels:
        key = int(images[0])
        return images[permutation(len(images), seed, SPLIT, key)[:total]]
    cluster = images
    for level in levels:
        cluster = level[cluster]
    order = np.argsort(cluster, kind="stable")
    starts = np.flatnonzero(np.diff(cluster[order], prepend=-1))
    parts = np.split(images[order], starts[1:])
    given = shares(np.array([len(part) for part in parts]), total)
    return np.concatenate(
        [_sample(part, levels[:-1], int(share), seed) for part, share in zip(parts, given, strict=True) if share]
    )


def _drawn(rows_ND: Tensor, most: int, key: int) -> Tensor:
    """Unit rows to train on: all, or a random sample."""
    if len(rows_ND) <= most:
        return torch.cat([unit_rows(rows_ND, part) for part in parts_of(len(rows_ND))])
    return unit_rows(rows_ND, np.sort(permutation(len(rows_ND), key)[:most]))
