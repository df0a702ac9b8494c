"""A few labelled images of each class, for semi-supervised methods: shards -> a smaller set of shards.

python -m data_tools.split_labels shards=DIR output=DIR labels_per_class=N [seed=0]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from ssl_pipeline.config import Config, Seed, run_command
from ssl_pipeline.data.decode import image_extension
from ssl_pipeline.data.shards.manifest import Manifest, write_manifest
from ssl_pipeline.data.shards.open import DataError, ShardIndex, open_shards
from ssl_pipeline.data.shards.origins import write_origins
from ssl_pipeline.data.shards.overlay import Labels
from ssl_pipeline.data_tools.candidates import Candidate
from ssl_pipeline.data_tools.output import output_in_the_making
from ssl_pipeline.data_tools.shard_writer import key_of, write_shards
from ssl_pipeline.randomness import SPLIT, permutation


class SplitLabels(Config):
    """Copy a few labelled images of each class, chosen at random, into shards of their own.

    The images are stored as they are, with their labels and the class names of the whole set. FixMatch reads them
    beside the whole set: data.shards=ALL data.labelled.shards=OUTPUT.
    """

    shards: str
    """Directory of labelled shards, or a pattern such as DIR/train-*.tar."""
    output: Path
    """Directory to write; it appears when everything is done."""
    labels_per_class: Annotated[int, Field(ge=1)]
    """Images of each class."""
    seed: Seed = 0
    """Another number makes another choice; with the same one, fewer images are a part of more."""
    samples_per_shard: Annotated[int, Field(ge=1, le=10**7)] = 1000
    """Images per shard."""
    overwrite: bool = False
    """Replace shards that an earlier run wrote to the same output."""


class ShardSource:
    """The images of shards as files named NUMBER/KEY.EXTENSION by their number in the index."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def read(self, name: str) -> bytes:
        return self.index.read(int(name.partition("/")[0])).image

    def name_of(self, sample: int) -> str:
        raw = self.index.read(sample)
        extension = image_extension(raw.image)
        if extension is None:
            raise DataError(f"{raw.location} is no JPEG, PNG or WebP image. Make the shards again without it.")
        return f"{sample}/{raw.key}.{extension}"


def split_labels(config: SplitLabels) -> int:
    """Write the shards, the manifest and the index; returns the exit code."""
    index = open_shards(config.shards)
    if config.output.resolve() == index.folder.resolve():
        raise DataError(f"output='{config.output}' holds the shards to choose from. Choose another output.")
    labels_N = index.labels()
    chosen = choose(labels_N, config, index.class_names)
    source = ShardSource(index)
    with output_in_the_making(config.output, overwrite=config.overwrite) as folder:
        samples = []
        for sample in chosen:
            name = source.name_of(sample)
            samples.append((Candidate(name, int(labels_N[sample])), name.rpartition(".")[2]))
        shards = write_shards(
            source,
            samples,
            folder,
            "labelled",
            samples_per_shard=config.samples_per_shard,
            packing=None,
            workers=1,  # a few images: starting processes would take longer
        )
        keys = [key_of(number, image.name) for number, (image, _) in enumerate(samples)]
        files = [index.origin(sample) or index.key(sample) for sample in chosen]
        write_origins(folder, zip(keys, files, strict=True))
        about: dict[str, str | int | None] = {
            "shards": config.shards,
            "labels_per_class": config.labels_per_class,
            "seed": config.seed,
        }
        write_manifest(folder, Manifest(index.class_names, shards, about))
        open_shards(folder)
    print(
        f"{len(chosen):,} of {len(index):,} images, {config.labels_per_class} of each of "
        f"{len(chosen) // config.labels_per_class} classes -> {config.output}"
    )
    return 0


def choose(labels_N: Labels, config: SplitLabels, class_names: tuple[str, ...] | None) -> list[int]:
    """The chosen samples, classes mixed; DataError if there are no labels, or too few in a class."""
    present = np.unique(labels_N[labels_N >= 0]).tolist()
    if not present:
        raise DataError(f"shards='{config.shards}' has no labels to choose by. make_shards takes them from folders.")
    parts = []
    for label in present if class_names is None else range(len(class_names)):
        of_class = np.flatnonzero(labels_N == label)
        if len(of_class) < config.labels_per_class:
            name = label if class_names is None else f"{label} ({class_names[label]})"
            raise DataError(
                f"labels_per_class={config.labels_per_class} is more than shards='{config.shards}' has of class "
                f"{name}: {len(of_class)}. Take at most that many."
            )
        order = permutation(len(of_class), config.seed, SPLIT, label)
        parts.append(of_class[order[: config.labels_per_class]])
    chosen = np.concatenate(parts)
    return chosen[permutation(len(chosen), config.seed, SPLIT)].tolist()


def command(name: str = "python -m data_tools.split_labels") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(SplitLabels, split_labels, command=name)
