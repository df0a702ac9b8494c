"""Choose images to train on: those similar to a seed set, or a balanced share of all. No shard is copied.

python -m data_tools.curate shards=DIR run=DIR|backbone=NAME output=FILE.npy seeds=SHARDS|clusters=1000,100 images=N
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from ssl_pipeline.commands.curated_images import (
    CurationConfig,
    Picture,
    Shown,
    features_of,
    name_of,
    open_images,
    open_others,
    say,
    write_choice,
)
from ssl_pipeline.config import ConfigError, PlaceText, Seed, run_command
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data_tools.curation.hierarchy import Numbers, balanced_sample, hierarchical_clusters
from ssl_pipeline.data_tools.curation.retrieval import retrieve
from ssl_pipeline.distributed import process_group, rank
from ssl_pipeline.files import JSON
from ssl_pipeline.randomness import SPLIT, permutation

Level = Annotated[int, Field(ge=1, le=10**8)]


class CurateConfig(CurationConfig):
    """Choose images to train on: those nearest to each image of a seed set, or equal shares of clusters of clusters.

    Leave out near duplicates first (data_tools.deduplicate), and give its file as keep=.
    """

    seeds: PlaceText | None = None
    """Shards with images of the kind that you want more of."""
    per_seed: Annotated[int, Field(ge=1, le=10_000)] = 4
    """With seeds: most images per seed, as in DINOv2; an image that two seeds bring counts once."""
    similarity: Annotated[float, Field(ge=-1, le=1)] = -1.0
    """With seeds: least cosine similarity to the seed."""
    clusters: tuple[Level, ...] | None = None
    """Clusters of each level of the hierarchy, the most first: `clusters=10000,1000,100`."""
    images: Annotated[int, Field(ge=1)] | None = None
    """With clusters: how many images to choose."""
    rounds: Annotated[int, Field(ge=0, le=100)] = 10
    """With clusters: how often each level is clustered again from the images nearest to its centroids."""
    nearest: Annotated[int, Field(ge=1, le=10_000)] = 15
    """With clusters: images of each cluster that the next round is made from."""
    seed: Seed = 0
    """Another number gives other clusters and another choice of their images."""

    @model_validator(mode="after")
    def _one_way(self) -> CurateConfig:
        if (self.seeds is None) == (self.clusters is None):
            raise ValueError("exactly one of seeds=SHARDS and clusters=1000,100 must be given.")
        if self.clusters is not None and self.images is None:
            raise ValueError("images is missing: clusters= needs the number of images to choose, images=N.")
        if self.seeds is not None and self.images is not None:
            raise ValueError("images belongs to clusters=. With seeds= the number comes from per_seed and similarity.")
        if self.clusters is not None and any(np.diff(self.clusters) >= 0):
            raise ValueError(f"clusters must decrease from level to level, such as 1000,100. Got {self.clusters}.")
        return self


def curate(config: CurateConfig) -> None:
    """Write the keep file and the contact sheet; with the processes of torchrun each computes a share of features."""
    index, model = open_images(config)
    seeds = None if config.seeds is None else open_others(config.seeds, "seeds")
    _check_counts(config, len(index))
    with process_group():
        say(f"{model.label}: {model.weights or model.about.get('images')}")
        features_ND = features_of(index, model, config, "images", shards=config.shards)
        seeds_MD = None if seeds is None else features_of(seeds, model, config, "seeds", shards=config.seeds)
        if rank() > 0:
            return
    if seeds is not None and seeds_MD is not None:
        _write_retrieved(config, index, features_ND, seeds, seeds_MD)
    else:
        _write_balanced(config, index, features_ND)


def _check_counts(config: CurateConfig, num_images: int) -> None:
    for key, count in (("clusters", (config.clusters or (0,))[0]), ("images", config.images or 0)):
        if count > num_images:
            raise ConfigError(f"{key}={count} is more than there are images: {num_images:,}. Take at most that many.")


def _write_retrieved(
    config: CurateConfig, index: ShardIndex, features_ND: Tensor, seeds: ShardIndex, seeds_MD: Tensor
) -> None:
    similarities, found = retrieve(features_ND, seeds_MD, k=config.per_seed)
    similarity_MK, found_MK = similarities.numpy(), found.numpy()
    near_MK = similarity_MK >= config.similarity
    chosen = np.unique(found_MK[near_MK])
    if not len(chosen):
        raise ConfigError(
            f"similarity={config.similarity:g} leaves no image: the nearest to a seed has {similarity_MK.max():.3f}. "
            "Lower it."
        )
    counts: dict[str, JSON] = {
        "images": len(index),
        "kept": len(chosen),
        "seeds": len(seeds),
        "seeds_that_bring_none": int((~near_MK.any(axis=1)).sum()),
        "brought_by_several_seeds": int(near_MK.sum()) - len(chosen),
        "per_seed": config.per_seed,
    }

    def shown() -> Iterator[Shown]:
        for seed in _spread(len(seeds), config.shown):
            brought = [
                Picture(index, int(sample), f"{similarity:.3f}: {name_of(index, int(sample))}")
                for sample, similarity in zip(found_MK[seed], similarity_MK[seed], strict=True)
                if similarity >= config.similarity
            ]
            yield Shown(f"seed {seed}", [Picture(seeds, seed, name_of(seeds, seed), "query"), *brought])

    lead = (
        f"{len(chosen):,} of {len(index):,} images stay: the {config.per_seed} nearest to each of {len(seeds):,} "
        f"seeds. {counts['brought_by_several_seeds']:,} were brought by several, "
        f"{counts['seeds_that_bring_none']:,} seeds bring none."
    )
    write_choice(config, index, chosen.tolist(), lead=lead, counts=counts, groups=shown(), command="curate")


def _write_balanced(config: CurateConfig, index: ShardIndex, features_ND: Tensor) -> None:
    assert config.clusters is not None
    assert config.images is not None
    levels = hierarchical_clusters(
        features_ND, config.clusters, seed=config.seed, rounds=config.rounds, nearest=config.nearest
    )
    chosen = balanced_sample(levels, config.images, seed=config.seed)
    top_N = levels[0]
    for level in levels[1:]:
        top_N = level[top_N]
    sizes, kept = (np.bincount(of, minlength=config.clusters[-1]) for of in (top_N, top_N[chosen]))
    counts: dict[str, JSON] = {
        "images": len(index),
        "kept": len(chosen),
        "clusters": list(config.clusters),
        "largest_top_cluster": int(sizes.max()),
        "smallest_top_cluster": int(sizes[sizes > 0].min()),
        "most_of_a_top_cluster": int(kept.max()),
    }
    largest_first = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]

    def shown() -> Iterator[Shown]:
        for place in _spread(len(largest_first), config.shown):
            cluster = int(largest_first[place])
            yield Shown(
                f"cluster {cluster}: {kept[cluster]:,} of {sizes[cluster]:,} images stay",
                [Picture(index, sample, name_of(index, sample)) for sample in _some(chosen[top_N[chosen] == cluster])],
            )

    lead = (
        f"{len(chosen):,} of {len(index):,} images stay, in equal shares of {config.clusters[-1]:,} clusters of "
        f"{counts['smallest_top_cluster']:,} to {counts['largest_top_cluster']:,} images: at most "
        f"{counts['most_of_a_top_cluster']:,} of each."
    )
    write_choice(config, index, chosen.tolist(), lead=lead, counts=counts, groups=shown(), command="curate")


def _spread(count: int, most: int) -> list[int]:
    """At most this many of range(count), evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist() if count and most else []


def _some(samples: Numbers, most: int = 16) -> list[int]:
    return samples[permutation(len(samples), SPLIT)[:most]].tolist()


def command(name: str = "python -m data_tools.curate") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(CurateConfig, curate, command=name, shared=True)
