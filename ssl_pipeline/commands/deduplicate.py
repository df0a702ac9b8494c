"""Near duplicates: one image of each group stays, none that a test set has too. No shard is copied.

python -m data_tools.deduplicate shards=DIR run=DIR|backbone=NAME output=FILE.npy threshold=0.75 [against=SHARDS]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ssl_pipeline.commands.curated_images import (
    CurationConfig,
    features_of,
    open_images,
    open_others,
    say,
    write_choice,
)
from ssl_pipeline.commands.duplicates_shown import Matched, shown_groups, shown_matches
from ssl_pipeline.config import PlaceText, run_command
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data_tools.curation.groups import Groups, Numbers, best_of_each
from ssl_pipeline.data_tools.curation.pixels import PixelCheck
from ssl_pipeline.data_tools.curation.planted import ALTERATIONS, chosen_to_copy, plant
from ssl_pipeline.distributed import process_group, rank
from ssl_pipeline.eval.features.models import EvaluatedModel
from ssl_pipeline.eval.features.passes import choose_device
from ssl_pipeline.eval.search.near_pairs import NearPairs, PairSearch, near_pairs, nearest_of
from ssl_pipeline.files import JSON

LARGE_GROUP = 0.01  # of all images: chains of pairs have joined what is not alike


class DeduplicateConfig(CurationConfig):
    """Leave out near duplicates: of images that are alike by their features the largest stays.

    Two images are near if the cosine similarity of their features is `threshold` or more and their pixels agree by
    `pixels` or more; what near pairs join is one group.
    """

    threshold: Annotated[float, Field(gt=0, le=1)]
    """Least cosine similarity of a pair. It depends on the backbone: planted=200 measures what it finds."""
    pixels: Annotated[float, Field(ge=0, le=1)] = 0.97
    """Least correlation of the pixels of a pair, whole, cut or mirrored; 0 uses only the features."""
    against: PlaceText | None = None
    """Shards of a test set: groups with an image near one of them are removed as a whole."""
    against_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Least cosine similarity to an image of `against`; by default as threshold."""
    search: PairSearch = "auto"
    """How pairs are found: exact (below 1 M images) or ivf, which misses some."""
    planted: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Copies of this many images are made (smaller, encoded again, 90 % cut out, mirrored), and the share that the
    threshold finds is reported. They are not written anywhere."""


def deduplicate(config: DeduplicateConfig) -> None:
    """Write the keep file and the contact sheet; with the processes of torchrun each computes a share of features."""
    index, model = open_images(config)
    test = None if config.against is None else open_others(config.against, "against")
    with process_group():
        say(f"{model.label}: {model.weights or model.about.get('images')}")
        features_ND = features_of(index, model, config, "images", shards=config.shards)
        test_MD = None if test is None else features_of(test, model, config, "against", shards=config.against)
        if rank() > 0:
            return
    check = PixelCheck(index, least=config.pixels)
    groups, pairs = _groups(features_ND, config, check)
    matched = None
    if test is not None and test_MD is not None:
        threshold = config.threshold if config.against_threshold is None else config.against_threshold
        matched = _matches(features_ND, test_MD, threshold, PixelCheck(index, test, least=config.pixels))
    kept, dropped_for_test = _kept(index, groups, matched)
    members = groups.members()
    counts: dict[str, JSON] = {
        "images": len(index),
        "kept": len(kept),
        "pairs": pairs,
        "groups": len(members),
        "largest_group": max(map(len, members), default=1),
        "duplicates": len(index) - len(kept) - dropped_for_test,
        "in_the_test_set": dropped_for_test,
    }
    if config.planted:
        counts["planted"] = _planted(index, groups, model, features_ND, config)
    _warn_of_chains(members, len(index), config)
    write_choice(
        config,
        index,
        kept.tolist(),
        lead=_lead(counts, config),
        counts=counts,
        groups=[
            *shown_matches(index, test, matched, config.shown // 2),
            *shown_groups(index, members, kept, features_ND, config.shown // 2),
        ],
        command="deduplicate",
    )


def _groups(features_ND: Tensor, config: DeduplicateConfig, check: PixelCheck) -> tuple[Groups, int]:
    """What near pairs join, and how many pairs there are; a pair within a group is not looked at again."""
    groups, pairs = Groups(len(features_ND)), 0
    device = choose_device(config.device)
    for found in near_pairs(features_ND, threshold=config.threshold, search=config.search, device=device):
        for part in _in_rounds(found, groups):
            agreeing = check(part.first, part.second)
            pairs += int(agreeing.sum())
            groups.join(part.first[agreeing], part.second[agreeing])
    return groups, pairs


def _in_rounds(found: NearPairs, groups: Groups, size: int = 1024) -> Iterator[NearPairs]:
    """Pairs that are not in one group yet, the most similar first, a part at a time."""
    order = np.argsort(-found.similarity, kind="stable")
    for start in range(0, len(order), size):
        some = order[start : start + size]
        some = some[groups.number_of[found.first[some]] != groups.number_of[found.second[some]]]
        if len(some):
            yield NearPairs(found.first[some], found.second[some], found.similarity[some])


def _matches(features_ND: Tensor, others_MD: Tensor, threshold: float, check: PixelCheck) -> Matched:
    """The images whose nearest one among others is near enough."""
    similarity_N, others_N = nearest_of(features_ND, others_MD)
    samples = np.flatnonzero(similarity_N.numpy() >= threshold)
    samples = samples[check(samples, others_N.numpy()[samples])]
    return Matched(samples, others_N.numpy()[samples], similarity_N.numpy()[samples])


def _kept(index: ShardIndex, groups: Groups, matched: Matched | None) -> tuple[Numbers, int]:
    """The images that stay, ascending, and how many were removed because of the test set."""
    quality_N2 = np.stack([index.sizes().prod(axis=1), index.lengths()], axis=1)
    kept = best_of_each(groups.number_of, quality_N2)
    if matched is None:
        return kept, 0
    gone_N = np.isin(groups.number_of, groups.number_of[matched.samples])
    return kept[~gone_N[kept]], int(gone_N.sum())


def _planted(
    index: ShardIndex, groups: Groups, model: EvaluatedModel, features_ND: Tensor, config: DeduplicateConfig
) -> dict[str, JSON]:
    """The share of altered copies that is found, by alteration, and the precision of what is found.

    A copy is found if the image nearest to it is near enough, and is right if that is what it was made from, or of the
    same group.
    """
    samples = np.array(chosen_to_copy(len(index), config.planted))
    with TemporaryDirectory() as name:
        copies = plant(index, samples.tolist(), Path(name))
        copies_MD = features_of(copies, model, config, "copies", shards=None)
        nearest = _matches(copies_MD, features_ND, config.threshold, PixelCheck(copies, index, least=config.pixels))
    originals_M = np.tile(samples, len(ALTERATIONS))
    right = groups.number_of[nearest.others] == groups.number_of[originals_M[nearest.samples]]
    found_M = np.zeros(len(originals_M), dtype=bool)
    found_M[nearest.samples[right]] = True
    shares: dict[str, JSON] = {
        alteration: _percent(part)
        for alteration, part in zip(ALTERATIONS, np.split(found_M, len(ALTERATIONS)), strict=True)
    }
    precision = _percent(right)
    told = ", ".join(f"{alteration} {share} %" for alteration, share in shares.items())
    say(f"planted copies of {len(samples):,} images: found {_percent(found_M)} % ({told}); precision {precision} %")
    return {"images": len(samples), "recall": _percent(found_M), "recall_by_kind": shares, "precision": precision}


def _percent(flags: NDArray[np.bool_]) -> float | None:
    return round(100 * float(flags.mean()), 2) if len(flags) else None


def _lead(counts: dict[str, JSON], config: DeduplicateConfig) -> str:
    test = f", {counts['in_the_test_set']:,} that {config.against} has too" if config.against else ""
    return (
        f"{counts['kept']:,} of {counts['images']:,} images stay: {counts['duplicates']:,} are near duplicates of them "
        f"(in {counts['groups']:,} groups){test}."
    )


def _warn_of_chains(members: Sequence[Numbers], num_images: int, config: DeduplicateConfig) -> None:
    largest = max(map(len, members), default=0)
    if largest > max(LARGE_GROUP * num_images, 20):
        say(
            f"warning: the largest group has {largest:,} images. Chains of pairs may have joined images that are not "
            f"alike: look at the sheet, and raise threshold={config.threshold:g}."
        )


def command(name: str = "python -m data_tools.deduplicate") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(DeduplicateConfig, deduplicate, command=name, shared=True)
