"""A share of every class held out for testing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.packing.shard_writer import Accepted
from ssl_pipeline.randomness import HOLDOUT, permutation


def held_out(samples: Sequence[Accepted], percent: float, seed: int) -> tuple[list[Accepted], list[Accepted]]:
    """The samples for training and those for testing, each in the order given.

    Of n images of a class, percent / 100 * n are held out, rounded, but at least one where there are two or more, and
    never all. Which ones depends only on the seed, the class and its images. Images without a label are for training.
    Raises DataError if no class has two images.
    """
    labels_N = np.array([-1 if candidate.label is None else candidate.label for candidate, _ in samples])
    tested = set[int]()
    for label in np.unique(labels_N[labels_N >= 0]).tolist():
        members = np.flatnonzero(labels_N == label)
        count = min(max(int(len(members) * percent / 100 + 0.5), 1), len(members) - 1)
        tested |= set(members[permutation(len(members), seed, HOLDOUT, label)[:count]].tolist())
    if not tested:
        raise DataError(f"holdout={percent:g}% needs a class of two images or more; every class has one at most.")
    train = [sample for number, sample in enumerate(samples) if number not in tested]
    return train, [samples[number] for number in sorted(tested)]
