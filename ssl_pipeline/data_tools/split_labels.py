"""A few labelled images of each class, for semi-supervised methods: shards -> fewer shards, or the images' numbers.

python -m data_tools.split_labels shards=DIR output=DIR|FILE.npy labels_per_class=N|fraction=1% [seed=0]
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, field_validator, model_validator

from ssl_pipeline.config import Config, Seed, run_command
from ssl_pipeline.config.output_file import is_a_folder, refuse_existing
from ssl_pipeline.data.decode import image_extension
from ssl_pipeline.data.shards.manifest import Manifest, read_manifest, write_manifest
from ssl_pipeline.data.shards.open import DataError, ShardIndex, open_shards
from ssl_pipeline.data.shards.origins import write_origins
from ssl_pipeline.data.shards.overlay import Labels
from ssl_pipeline.data.subset import write_keep
from ssl_pipeline.packing.candidates import Candidate
from ssl_pipeline.packing.output import output_in_the_making
from ssl_pipeline.packing.shard_writer import key_of, write_shards
from ssl_pipeline.randomness import SPLIT, permutation

About = dict[str, str | int | None]


class SplitLabels(Config):
    """Choose a few labelled images of each class at random, and copy them into separate shards.

    The images are stored as they are, with their labels and the class names of the whole set. FixMatch reads them
    beside the whole set: data.shards=ALL data.labelled.shards=OUTPUT. With output=FILE.npy nothing is copied: the file
    holds their numbers for data.labelled.shards=ALL data.labelled.keep=FILE.npy, FILE.rest.npy those of all others, if
    there are others. For several draws give each call its seed and its output; eval.compare draws for each seed itself.
    """

    shards: str
    """Directory of labelled shards, or a pattern such as DIR/train-*.tar."""
    output: Path
    """Directory to write; it appears when everything is done. Or FILE.npy, for numbers only."""
    labels_per_class: Annotated[int, Field(ge=1)] | None = None
    """Images of each class."""
    fraction: str | None = None
    """Share of the images of each class, such as 1%, rounded; at least one. In place of labels_per_class."""
    seed: Seed = 0
    """Another number gives another choice; with the same one, a smaller choice is a subset of a larger one."""
    samples_per_shard: Annotated[int, Field(ge=1, le=10**7)] = 1000
    """Images per shard."""
    overwrite: bool = False
    """Replace what an earlier run wrote to the same output."""

    @field_validator("output")
    @classmethod
    def _folder_or_numbers(cls, output: Path) -> Path:
        return output if output.suffix == ".npy" else is_a_folder(output)

    @field_validator("fraction", mode="before")
    @classmethod
    def _fraction_is_a_share(cls, fraction: object) -> object:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(fraction))
        if fraction is not None and not (match and 0 < float(match[1]) <= 100):
            raise ValueError(f"must be a share above 0% and up to 100%, such as 1%. Got {fraction}.")
        return fraction

    @model_validator(mode="after")
    def _one_of_two_counts(self) -> SplitLabels:
        if (self.labels_per_class is None) == (self.fraction is None):
            raise ValueError("exactly one of labels_per_class=N and fraction=1% must be given.")
        return self

    @property
    def writes_numbers(self) -> bool:
        """Whether the output is a file of numbers."""
        return self.output.suffix == ".npy"

    def count_of(self, num_images: int) -> int:
        """How many of the images of a class are chosen."""
        if self.labels_per_class is not None:
            return self.labels_per_class
        assert self.fraction is not None
        return max(int(num_images * float(self.fraction.rstrip("% ")) / 100 + 0.5), 1)


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
            raise DataError(f"{raw.location} is not a JPEG, PNG or WebP image. Make the shards again without it.")
        return f"{sample}/{raw.key}.{extension}"


def split_labels(config: SplitLabels) -> int:
    """Write the shards, the manifest and the index; returns the exit code."""
    index = open_shards(config.shards)
    if config.output.resolve() == index.folder.resolve():
        raise DataError(f"output='{config.output}' holds the shards to choose from. Choose another output.")
    labels_N = index.labels()
    chosen = choose(labels_N, config, index.class_names)
    about = _origin(config, index)
    if config.writes_numbers:
        _write_numbers(config, index, chosen, about)
    else:
        _write_shards(config, index, chosen, about)
    num_classes = len(np.unique(labels_N[chosen]))
    print(f"{len(chosen):,} of {len(index):,} images, of {num_classes} classes -> {config.output}")
    return 0


def split_labels_once(config: SplitLabels) -> None:
    """The same, or what it has written before; DataError if that was drawn from other images or with other settings."""
    there = _drawn_before(config.output) if config.writes_numbers else _copied_before(config.output)
    if there is None:  # maybe there is what an interrupted one has left
        split_labels(config.model_copy(update={"overwrite": config.writes_numbers}))
        return
    wanted = _origin(config, open_shards(config.shards))
    images = "fingerprint" if "fingerprint" in there else "shards"  # wherever the same images lie
    if any(there.get(key) != wanted.get(key) for key in ("labels_per_class", "fraction", "seed", images)):
        raise DataError(
            f"{config.output} holds labelled images that were drawn with {_in_words(there)}; this command draws with "
            f"{_in_words(wanted)}. Set all as it was to go on, or choose another output: what was trained there has "
            "learnt the old ones."
        )


def _origin(config: SplitLabels, index: ShardIndex) -> About:
    """What the choice depends on, as it is written beside it."""
    about: About = {
        "shards": config.shards,
        "fingerprint": index.fingerprint,
        "labels_per_class": config.labels_per_class,
        "fraction": config.fraction,
        "seed": config.seed,
    }
    return {name: value for name, value in about.items() if value is not None}


def _in_words(about: About) -> str:
    keys = ("shards", "labels_per_class", "fraction", "seed")
    images = f" (images {str(about['fingerprint'])[:8]})" if "fingerprint" in about else ""
    return ", ".join(f"{key}={about[key]}{images if key == 'shards' else ''}" for key in keys if key in about)


def _drawn_before(output: Path) -> About | None:
    """The origin of numbers that are there as a whole; they are written after the rest."""
    description = output.with_suffix(".json")
    if not description.exists():
        return None
    origin: About = json.loads(description.read_text(encoding="utf-8"))["origin"]
    return origin


def _copied_before(output: Path) -> About | None:
    manifest = read_manifest(output)
    return None if manifest is None else manifest.source


def _write_numbers(config: SplitLabels, index: ShardIndex, chosen: list[int], about: About) -> None:
    """FILE.npy and FILE.rest.npy for `keep`."""
    rest = np.setdiff1d(np.arange(len(index)), chosen)
    files = {config.output.with_suffix(".rest.npy"): rest, config.output: np.array(chosen)}
    refuse_existing(*reversed(files), overwrite=config.overwrite)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    for path, numbers in files.items():
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        if len(numbers):
            write_keep(path, index, numbers, origin={"command": "split_labels", **about})
    if not len(rest):
        print(f"all {len(index):,} images are chosen, so there is no {config.output.with_suffix('.rest.npy').name}")


def _write_shards(config: SplitLabels, index: ShardIndex, chosen: list[int], about: About) -> None:
    """The images in shards of their own, with manifest and index."""
    source, labels_N = ShardSource(index), index.labels()
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
        )
        keys = [key_of(number, image.name) for number, (image, _) in enumerate(samples)]
        files = [index.origin(sample) or index.key(sample) for sample in chosen]
        write_origins(folder, zip(keys, files, strict=True))
        write_manifest(folder, Manifest(index.class_names, shards, about))
        open_shards(folder)


def choose(labels_N: Labels, config: SplitLabels, class_names: tuple[str, ...] | None) -> list[int]:
    """The chosen samples, classes mixed; DataError if there are no labels, or too few in a class."""
    present = np.unique(labels_N[labels_N >= 0]).tolist()
    if not present:
        raise DataError(f"shards='{config.shards}' has no labels to choose by. make_shards takes them from folders.")
    parts = []
    for label in present if class_names is None else range(len(class_names)):
        of_class = np.flatnonzero(labels_N == label)
        count = config.count_of(len(of_class))
        if len(of_class) < count:
            name = label if class_names is None else f"{label} ({class_names[label]})"
            if config.fraction is not None:
                raise DataError(
                    f"fraction={config.fraction} takes one image of each class at least, and shards='{config.shards}' "
                    f"has none of class {name}. Pack the images again without that class, or with images of it."
                )
            raise DataError(
                f"labels_per_class={count} is more than shards='{config.shards}' has of class "
                f"{name}: {len(of_class)}. Take at most that many."
            )
        order = permutation(len(of_class), config.seed, SPLIT, label)
        parts.append(of_class[order[:count]])
    chosen = np.concatenate(parts)
    return chosen[permutation(len(chosen), config.seed, SPLIT)].tolist()


def command(name: str = "python -m data_tools.split_labels") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(SplitLabels, split_labels, command=name)
