"""What the contact sheet of a deduplication shows: where mistakes are most likely, and the largest groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.commands.curated_images import Picture, Shown, name_of
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data_tools.curation.groups import Numbers
from ssl_pipeline.eval.search.near_pairs import unit_rows

MOST_COMPARED = 10_000  # groups among which the least similar are looked for


@dataclass(frozen=True)
class Matched:
    """Images that a test set has too: which, with what image of it, and how similar."""

    samples: Numbers
    others: Numbers
    similarity: NDArray[np.float32]


def shown_matches(index: ShardIndex, test: ShardIndex | None, matched: Matched | None, count: int) -> Iterator[Shown]:
    """Images that the test set has too, next to their match: the least similar first, as mistakes are there."""
    if test is None or matched is None:
        return
    for place in np.argsort(matched.similarity, kind="stable")[:count].tolist():
        sample, other = int(matched.samples[place]), int(matched.others[place])
        yield Shown(
            f"in the test set: {matched.similarity[place]:.3f}",
            [
                Picture(test, other, f"test: {name_of(test, other)}", "query"),
                Picture(index, sample, f"left out: {name_of(index, sample)}", "other"),
            ],
        )


def shown_groups(
    index: ShardIndex, members: Sequence[Numbers], kept: Numbers, features_ND: Tensor, count: int
) -> Iterator[Shown]:
    """Groups, each with what stays first: half of them the largest, the others with the least similar images."""
    large = list(members[: count // 2])
    others = [_of_a_group(group, kept, features_ND) for group in members[count // 2 :][:MOST_COMPARED]]
    others.sort(key=lambda group: group.similarity.min())
    for group in [_of_a_group(group, kept, features_ND) for group in large] + others[: count - len(large)]:
        yield Shown(
            f"{len(group.samples)} images, similarity from {group.similarity.min():.3f}",
            [
                Picture(
                    index,
                    sample,
                    f"{'stays' if place == 0 else f'{group.similarity[place]:.3f}'}: {name_of(index, sample)}",
                    "query" if place == 0 else "other",
                )
                for place, sample in enumerate(group.samples.tolist())
            ],
        )


@dataclass(frozen=True)
class Compared:
    """The images of a group, the one that stays first, and their similarity to it; the least similar come next."""

    samples: Numbers
    similarity: NDArray[np.float32]


def _of_a_group(group: Numbers, kept: Numbers, features_ND: Tensor) -> Compared:
    stays = np.isin(group, kept)
    first = int(group[int(stays.argmax())])  # in a group that is removed as a whole any will do
    rest = group[group != first]
    similarity = (unit_rows(features_ND, rest) @ unit_rows(features_ND, np.array([first])).T)[:, 0].numpy()
    order = np.argsort(similarity, kind="stable")
    return Compared(np.concatenate(([first], rest[order])), np.concatenate(([1.0], similarity[order])))
