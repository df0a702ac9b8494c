"""How many images of one set are in another one too, by their bytes; no image is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.files import sha256_of_bytes

MOST_IMAGES = 10_000  # of the second set that are looked for one by one: a second or so for CIFAR-10
MOST_READ = 200_000  # images of the first set that may be looked into: those of the same length, height and width
EXCERPT = 2048  # bytes from the middle of an image and from its end; the head may be the same for a whole set


@dataclass(frozen=True)
class SharedImages:
    """`count` of the `looked_at` images of the second set, which has `total`, are in the first one."""

    count: int
    looked_at: int
    total: int


def shared_images(first: ShardIndex, second: ShardIndex) -> SharedImages:
    """Count the images of `second` that are in `first` byte for byte.

    Shards with the same SHA-256 share all images. Of the others at most MOST_IMAGES, evenly spread, are looked for
    among the images of the same length, height and width, by bytes from their middle and end. Shards at a URL are
    compared only by their SHA-256, so that none is fetched for this.
    """
    in_same_shards_N = _of_same_shards(first, second)
    count, rest = int(in_same_shards_N.sum()), np.flatnonzero(~in_same_shards_N)
    if first.is_remote or second.is_remote:
        return SharedImages(count, len(second), len(second))
    chosen = rest[:: -(-len(rest) // MOST_IMAGES)] if len(rest) else rest
    firsts_N, seconds_N = _lengths_and_sizes(first), _lengths_and_sizes(second)
    while (candidates := np.flatnonzero(np.isin(firsts_N, seconds_N[chosen]))).size > MOST_READ and len(chosen) > 1:
        chosen = chosen[::2]
    found = {_digest(first, sample) for sample in candidates.tolist()}
    count += sum(_digest(second, sample) in found for sample in chosen.tolist())
    return SharedImages(count, len(second) - len(rest) + len(chosen), len(second))


def _of_same_shards(first: ShardIndex, second: ShardIndex) -> NDArray[np.bool_]:
    """Whether each image of `second` (N,) lies in a shard that `first` has whole."""
    whole = first.overlay.keep is None and first.image_key == second.image_key
    known = set(first.catalogue.table.sha256) if whole else set()
    same_S = np.array([sha256 in known for sha256 in second.catalogue.table.sha256], dtype=bool)
    return np.repeat(same_S, second.shard_counts)


def _lengths_and_sizes(index: ShardIndex) -> NDArray[np.int64]:
    """A number for each image (N,) that is equal where length, height and width are, and seldom elsewhere."""
    heights_N, widths_N = index.sizes().T
    return (index.lengths() * 1_000_003 + heights_N) * 1_000_003 + widths_N


def _digest(index: ShardIndex, sample: int) -> str:
    return sha256_of_bytes(index.excerpt(sample, EXCERPT))
