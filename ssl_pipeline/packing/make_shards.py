"""Images -> WebDataset shards: checked, shuffled as a whole, cut into tar files, listed in a manifest.

python -m data_tools.make_shards source=FOLDER|ZIP|digits output=DIR [prefix=train/] [labels=FILE.csv] [holdout=10%]
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ssl_pipeline.config import PlaceText, Seed, printable, run_command
from ssl_pipeline.config.output_file import is_a_folder
from ssl_pipeline.data.decode import DecodeError, decode_image, image_extension
from ssl_pipeline.data.shards.manifest import Manifest, ManifestShard, write_manifest
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.data.shards.origins import ORIGINS_FILE, write_origins
from ssl_pipeline.files import write_text
from ssl_pipeline.packing.candidates import (
    Candidate,
    Candidates,
    find_candidates,
    label_candidates,
    no_images,
    parts_of_a_set,
    path_parts,
)
from ssl_pipeline.packing.conversion import storable
from ssl_pipeline.packing.engine import EngineConfig, map_tasks
from ssl_pipeline.packing.holdout import held_out
from ssl_pipeline.packing.label_table import read_label_table
from ssl_pipeline.packing.output import PARTS, REJECTED_FILE, output_in_the_making
from ssl_pipeline.packing.ray_engine import require_ray
from ssl_pipeline.packing.reduced import Packing, packed_size
from ssl_pipeline.packing.resuming import check_journal, name_of_work, shard_journal
from ssl_pipeline.packing.shard_writer import Accepted, key_of, write_shards
from ssl_pipeline.packing.sources import Rejected, Source, UnreadableFileError, open_source
from ssl_pipeline.randomness import permutation

CHUNK = 200  # files per task of the check
DEFAULT_QUALITY = 90
REASONS_SHOWN = 5
ELSEWHERE = {"overwrite", "resume", "workers", "engine", "ray_address"}  # settings that change nothing in the shards


class MakeShards(EngineConfig):
    """Write the images of a folder, a zip or scikit-learn's digits into WebDataset shards.

    Class folders become labels, a flat folder has none. JPEG, PNG and WebP files are stored as they are, unless
    short_side is given; GIF (the first frame), BMP and TIFF become PNG. Files that cannot be decoded are left out and
    listed in rejected.jsonl; files.jsonl says which file became which image.
    """

    source: PlaceText
    """Folder, zip file, one image, or the word digits."""
    output: Path
    """Directory to write; it appears when everything is done."""
    prefix: str = ""
    """Take only what is below this folder of the source, e.g. train/."""
    split: Literal["train", "test"] | None = None
    """Part of source=digits; train if not given."""
    labels: PlaceText | None = None
    """folders: the top folders are classes, whatever they are called; images outside them have no label. none: no
    labels. FILE.csv: a table with the columns file and label. By default folders, if any."""
    holdout: str | None = None
    """Write OUTPUT/train and OUTPUT/test, with this share of every class in test, such as 10%."""
    short_side: Annotated[int, Field(ge=16, le=65535)] | None = None
    """Store baseline JPEG with at most this many pixels on the shorter side; 320 suits training at 224."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """JPEG quality for short_side; 90 if not given."""
    samples_per_shard: Annotated[int, Field(ge=1, le=10**7)] = 1000
    """Images per shard."""
    shuffle_seed: Seed = 0
    """Another number gives another order, and holds out other images."""
    resume: bool | None = None
    """Whether the work of an interrupted run is kept, so that the same command resumes it; by default with
    engine=ray."""
    overwrite: bool = False
    """Replace shards that an earlier run wrote to the same output."""

    @field_validator("output")
    @classmethod
    def _output_is_a_folder(cls, output: Path) -> Path:
        return output if output.is_file() else is_a_folder(output)  # the error says what is needed instead of a file

    @field_validator("labels")
    @classmethod
    def _labels_have_a_source(cls, labels: str | None) -> str | None:
        if labels not in (None, "folders", "none") and not labels.lower().endswith(".csv"):
            raise ValueError(f"must be folders, none or a FILE.csv with the columns file and label. Got {labels}.")
        return labels

    @field_validator("holdout", mode="before")
    @classmethod
    def _holdout_is_a_share(cls, holdout: object) -> object:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(holdout))
        if holdout is not None and not (match and 0 < float(match[1]) < 100):
            raise ValueError(f"must be a share between 0% and 100%, such as 10%. Got {holdout}.")
        return holdout

    @model_validator(mode="after")
    def _holdout_needs_labels(self) -> MakeShards:
        if self.holdout is not None and self.labels == "none":
            raise ValueError("holdout takes its share of every class, but labels=none leaves no class.")
        return self

    @model_validator(mode="after")
    def _quality_needs_short_side(self) -> MakeShards:
        if self.quality is not None and self.short_side is None:
            raise ValueError(
                f"quality={self.quality} goes with short_side=PIXELS. Without it images are stored as they are."
            )
        return self

    @property
    def packing(self) -> Packing | None:
        """How images are encoded again, if they are."""
        if self.short_side is None:
            return None
        return Packing(self.short_side, DEFAULT_QUALITY if self.quality is None else self.quality)


def make_shards(config: MakeShards, *, opened: Source | None = None) -> int:
    """Write the shards, the manifest, the index and the lists of files; returns the exit code.

    opened: what `config` names as the source, where that is open already, so that a folder is not walked again.
    """
    if config.engine == "ray":
        require_ray(config.ray_address)
    source = opened or open_source(config.source, config.prefix, config.split)
    found = _candidates(source, config)
    if not found.images:
        raise DataError(f"{no_images('source', config.source, found)} Is prefix= missing?")
    if config.holdout is not None and found.class_names is None:
        raise DataError(
            f"holdout={config.holdout} takes its share of every class, but source='{config.source}' has no class "
            "folders. Give labels by labels=FILE.csv, or leave holdout out."
        )
    kept = config.engine == "ray" if config.resume is None else config.resume
    work = name_of_work(config.model_dump(mode="json", exclude=ELSEWHERE), found.images) if kept else None
    with output_in_the_making(config.output, overwrite=config.overwrite, work=work) as folder:
        accepted, undecodable = _check(source, found.images, folder, work, config)
        if not accepted:
            raise DataError(
                f"None of the {len(found.images)} images of '{config.source}' can be decoded; "
                f"'{undecodable[-1].file}': {undecodable[-1].reason}."
            )
        rejected = found.others + undecodable
        stem = config.output.resolve().name
        if config.holdout is None:
            parts = {"": accepted}
        else:
            parts = dict(
                zip(PARTS, held_out(accepted, float(config.holdout.rstrip("% ")), config.shuffle_seed), strict=True)
            )
        sizes = []
        for part, samples in parts.items():
            (folder / part).mkdir(exist_ok=True)
            name = f"{stem}-{part}" if part else stem
            shards = _write_part(source, samples, folder / part, name, found.class_names, len(rejected), work, config)
            sizes.append((part, samples, shards))
        write_text(folder / REJECTED_FILE, "".join(json.dumps(asdict(entry)) + "\n" for entry in rejected))
    for part, samples, shards in sizes:
        _report(config.output / part, samples, shards, found.class_names)
    _report_left_out(config, rejected)
    return 0


def _candidates(source: Source, config: MakeShards) -> Candidates:
    """The images of the source with their labels; DataError for a table of labels that names none of them."""
    if config.labels is not None and config.labels not in ("folders", "none"):
        table = read_label_table(Path(config.labels))
        found = label_candidates(source, table.below(config.prefix), table.class_names)
        if found.images and all(candidate.label is None for candidate in found.images):
            raise DataError(
                f"labels={config.labels} names none of the {len(found.images)} images of source='{config.source}', "
                f"such as '{found.images[0].name}'. Its column file must hold their names as they are there."
            )
        unmatched = sorted(table.labels.keys() - {"/".join(path_parts(image.name)) for image in found.images})
        if unmatched and not config.prefix:
            print(f"{len(unmatched):,} rows of {config.labels} name no image of the source, such as '{unmatched[0]}'")
        return found
    found = find_candidates(source, labels=config.labels)
    if config.labels is None and (parts := parts_of_a_set(found)):
        raise _splits_for_classes(config, parts)
    return found


def _splits_for_classes(config: MakeShards, folders: Sequence[str]) -> DataError:
    found = ", ".join(f"{folder}/" for folder in folders)
    prefix = "/".join([*path_parts(config.prefix), folders[0]])
    return DataError(
        f"source='{config.source}' holds {found}: parts of a data set rather than classes. Take one part with "
        f"prefix={prefix}/, or all without labels with labels=none. If these are classes, set labels=folders."
    )


def _check(
    source: Source, candidates: Sequence[Candidate], folder: Path, work: str | None, config: MakeShards
) -> tuple[list[Accepted], list[Rejected]]:
    """Candidates that decode, each with the extension that its content calls for, and the others with the reason."""
    chunks = [candidates[start : start + CHUNK] for start in range(0, len(candidates), CHUNK)]
    results = map_tasks(
        partial(_check_chunk, source, config.packing),
        chunks,
        sizes=[len(chunk) for chunk in chunks],
        engine=config,
        description="checking images",
        journal=check_journal(folder, work),
    )
    checked = list(zip(candidates, (result for chunk in results for result in chunk), strict=True))
    accepted = [(candidate, extension) for candidate, (extension, _) in checked if extension]
    return accepted, [Rejected(candidate.name, reason) for candidate, (extension, reason) in checked if not extension]


def _check_chunk(source: Source, packing: Packing | None, candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    """(extension, "") for each image that decodes and can be packed, ("", reason) for the others."""
    results = []
    for candidate in candidates:
        try:
            data = storable(source.read(candidate.name))
            height, width, _ = decode_image(data).shape
            if packing is not None:
                packed_size(height, width, packing.short_side)
            results.append((image_extension(data) or "", "no JPEG, PNG or WebP image"))
        except (UnreadableFileError, DecodeError) as error:
            results.append(("", str(error)))
    return results


def _write_part(
    source: Source,
    samples: Sequence[Accepted],
    folder: Path,
    stem: str,
    class_names: Sequence[str] | None,
    rejected: int,
    work: str | None,
    config: MakeShards,
) -> list[ManifestShard]:
    """One set of shards with its manifest, its list of files and its index."""
    shuffled = [samples[number] for number in permutation(len(samples), config.shuffle_seed)]
    shards = write_shards(
        source,
        shuffled,
        folder,
        stem,
        samples_per_shard=config.samples_per_shard,
        packing=config.packing,
        engine=config,
        journal=shard_journal(folder, work),
    )
    start = "".join(f"{part}/" for part in path_parts(config.prefix))
    write_origins(folder, [(key_of(n, image.name), start + image.name) for n, (image, _) in enumerate(shuffled)])
    about: dict[str, str | int | None] = {
        "source": config.source,
        "prefix": config.prefix,
        "split": (config.split or "train") if config.source == "digits" else None,
        "labels": config.labels,
        "holdout": config.holdout,
        "shuffle_seed": config.shuffle_seed,
        "short_side": config.short_side,
        "quality": None if config.packing is None else config.packing.quality,
    }
    write_manifest(folder, Manifest(class_names, shards, about, rejected))
    open_shards(folder)
    return shards


def _report(
    folder: Path, samples: Sequence[Accepted], shards: Sequence[ManifestShard], class_names: Sequence[str] | None
) -> None:
    classes = "without labels"
    if class_names is not None:
        shown = ", ".join(class_names[:3]) + (", ..." if len(class_names) > 3 else "")
        classes = f"in {len(class_names)} {'class' if len(class_names) == 1 else 'classes'} ({shown})"
        unlabelled = sum(candidate.label is None for candidate, _ in samples)
        classes += f", {unlabelled:,} of them without a label" if unlabelled else ""
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    count = sum(shard.samples for shard in shards)
    _say(
        f"{count:,} image{'s' * (count != 1)} {classes} -> "
        f"{len(shards)} shard{'s' * (len(shards) != 1)}, {megabytes:.1f} MB, "
        f"in {folder} ({ORIGINS_FILE} says which file became which)"
    )


def _report_left_out(config: MakeShards, rejected: Sequence[Rejected]) -> None:
    """How many files were left out, by reason, the most frequent first; numbers within a reason make no other one."""
    if not rejected:
        return
    kinds = Counter(re.sub(r"\d+", "N", entry.reason) for entry in rejected)
    first = {re.sub(r"\d+", "N", entry.reason): entry for entry in reversed(rejected)}
    shown = [
        f"{count:,} {first[kind].reason} ('{first[kind].file}')" for kind, count in kinds.most_common(REASONS_SHOWN)
    ]
    others = sum(kinds.values()) - sum(count for _, count in kinds.most_common(REASONS_SHOWN))
    _say(
        f"{len(rejected):,} files left out: {'; '.join(shown)}{f'; {others:,} for other reasons' if others else ''}. "
        f"All are listed in {config.output / REJECTED_FILE}"
    )


def _say(text: str) -> None:
    print(printable(text))


def command(name: str = "python -m data_tools.make_shards") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(MakeShards, make_shards, command=name)
