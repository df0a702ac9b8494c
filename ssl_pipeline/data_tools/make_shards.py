"""Images -> WebDataset shards: checked, shuffled as a whole, cut into tar files, listed in a manifest.

python -m data_tools.make_shards source=FOLDER|ZIP|digits output=DIR [prefix=train/] [short_side=320]
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from webdataset import TarWriter

from ssl_pipeline.config import Config, run_command
from ssl_pipeline.data.decode import DecodeError, decode_image, image_extension
from ssl_pipeline.data.shards.manifest import Manifest, ManifestShard, write_manifest
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.data_tools.candidates import Candidate, Rejected, find_candidates, looks_like_splits, path_parts
from ssl_pipeline.data_tools.output import REJECTED_FILE, output_in_the_making
from ssl_pipeline.data_tools.packing import Packing, pack, packed_size
from ssl_pipeline.data_tools.processes import map_in_processes
from ssl_pipeline.data_tools.sources import Source, UnreadableFileError, open_source
from ssl_pipeline.files import sha256_of, sync, write_text
from ssl_pipeline.randomness import permutation

CHUNK = 200  # files per task of the check
DEFAULT_QUALITY = 90


class MakeShards(Config):
    """Write the images of a folder, a zip or scikit-learn's digits into WebDataset shards.

    Class folders become labels, a flat folder has none. Image files are stored as they are, unless short_side is
    given. Files that cannot be decoded are left out and listed in rejected.jsonl.
    """

    source: str
    """Folder, zip file, or the word digits."""
    output: Path
    """Directory to write; it appears when everything is done."""
    prefix: str = ""
    """Take only what lies below this folder of the source, e.g. train/."""
    split: Literal["train", "test"] | None = None
    """Part of source=digits; train if not given."""
    labels: Literal["folders", "none"] | None = None
    """folders: the top folders are classes, whatever they are called. none: no labels. By default folders, if any."""
    short_side: Annotated[int, Field(ge=16)] | None = None
    """Store baseline JPEG with at most this many pixels on the shorter side; 320 suits training at 224."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """JPEG quality for short_side; 90 if not given."""
    samples_per_shard: Annotated[int, Field(ge=1)] = 1000
    """Images per shard."""
    shuffle_seed: Annotated[int, Field(ge=0)] = 0
    """Another number gives another order."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes; by default one per core, at most 16."""
    overwrite: bool = False
    """Replace shards that an earlier run wrote to the same output."""

    @model_validator(mode="after")
    def _quality_needs_short_side(self) -> MakeShards:
        if self.quality is not None and self.short_side is None:
            raise ValueError(
                f"quality={self.quality} goes with short_side=PIXELS. Without it images are stored as they are."
            )
        return self

    @property
    def packing(self) -> Packing | None:
        """How images are encoded anew, if they are."""
        if self.short_side is None:
            return None
        return Packing(self.short_side, DEFAULT_QUALITY if self.quality is None else self.quality)


def make_shards(config: MakeShards) -> int:
    """Write the shards, the manifest, the index and the list of rejected files; returns the exit code."""
    source = open_source(config.source, config.prefix, config.split)
    candidates, class_names, rejected = find_candidates(source, labels=config.labels)
    if config.labels is None and class_names and looks_like_splits(class_names):
        raise _splits_for_classes(config, class_names)
    if not candidates:
        raise DataError(
            f"source='{config.source}' has no image file (.jpg .jpeg .png .webp) among {len(rejected)} files. "
            "Is prefix= missing?"
        )
    with output_in_the_making(config.output, overwrite=config.overwrite) as folder:
        accepted, undecodable = _check(source, candidates, config)
        rejected += undecodable
        if not accepted:
            raise DataError(
                f"None of the {len(candidates)} images can be decoded; '{rejected[-1].file}': {rejected[-1].reason}."
            )
        order = permutation(len(accepted), config.shuffle_seed)
        shuffled = [accepted[number] for number in order]
        shards = _write(source, shuffled, folder, config)
        _write_lists(folder, config, shards, class_names, rejected)
        open_shards(folder)
    _report(config, shards, class_names, rejected)
    return 0


def _splits_for_classes(config: MakeShards, folders: Sequence[str]) -> DataError:
    found = ", ".join(f"{folder}/" for folder in folders)
    likeliest = min(folders, key=lambda folder: not folder.lower().startswith("train"))
    prefix = "/".join([*path_parts(config.prefix), likeliest])
    return DataError(
        f"source='{config.source}' holds {found}: parts of a data set rather than classes. Take one part with "
        f"prefix={prefix}/, or all without labels with labels=none. If these are classes, say labels=folders."
    )


def _check(
    source: Source, candidates: Sequence[Candidate], config: MakeShards
) -> tuple[list[tuple[Candidate, str]], list[Rejected]]:
    """Candidates that decode, each with the extension that its content calls for, and the others with the reason."""
    chunks = [candidates[start : start + CHUNK] for start in range(0, len(candidates), CHUNK)]
    results = map_in_processes(
        partial(_check_chunk, source, config.packing),
        chunks,
        sizes=[len(chunk) for chunk in chunks],
        workers=config.workers,
        description="checking images",
    )
    checked = list(zip(candidates, (result for chunk in results for result in chunk), strict=True))
    accepted = [(candidate, extension) for candidate, (extension, _) in checked if extension]
    return accepted, [Rejected(candidate.name, reason) for candidate, (extension, reason) in checked if not extension]


def _check_chunk(source: Source, packing: Packing | None, candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    """(extension, "") for each image that decodes and can be packed, ("", reason) for the others."""
    results = []
    for candidate in candidates:
        try:
            data = source.read(candidate.name)
            height, width, _ = decode_image(data).shape
            if packing is not None:
                packed_size(height, width, packing.short_side)
            results.append((image_extension(data) or "", "no JPEG, PNG or WebP image"))
        except (UnreadableFileError, DecodeError) as error:
            results.append(("", str(error)))
    return results


def _write(
    source: Source, samples: Sequence[tuple[Candidate, str]], folder: Path, config: MakeShards
) -> list[ManifestShard]:
    stem = re.sub(r"[^\w-]", "_", config.output.resolve().name, flags=re.ASCII) or "shard"
    size = config.samples_per_shard
    tasks = [
        (folder / f"{stem}-{start // size:06d}.tar", start, samples[start : start + size])
        for start in range(0, len(samples), size)
    ]
    return map_in_processes(
        partial(write_shard, source, packing=config.packing),
        tasks,
        sizes=[len(part) for _, _, part in tasks],
        workers=config.workers,
        description="writing shards",
    )


def write_shard(
    source: Source, task: tuple[Path, int, Sequence[tuple[Candidate, str]]], *, packing: Packing | None = None
) -> ManifestShard:
    """Write one tar: its path, the number of its first sample, and its files with their extensions.

    Images are stored as they are, or packed.
    """
    path, start, samples = task
    # times and owners are fixed: the same images and seed give the same bytes
    with path.open("wb") as file, TarWriter(file, encoder=False, user="", group="", mtime=0) as writer:
        for number, (candidate, extension) in enumerate(samples, start):
            try:
                image = source.read(candidate.name)
                if packing is not None:
                    image, extension = pack(image, packing), "jpg"
            except (UnreadableFileError, DecodeError) as error:
                raise DataError(f"'{candidate.name}' became unreadable while shards were written: {error}.") from None
            label = {} if candidate.label is None else {"cls": str(candidate.label).encode()}
            writer.write({"__key__": key_of(number, candidate.name), extension: image, **label})
    sync(path)
    return ManifestShard(path.name, len(samples), path.stat().st_size, sha256_of(path))


def key_of(number: int, name: str) -> str:
    """A key that is unique by its number and recognisable by what is left of the file's name."""
    readable = re.sub(r"[^A-Za-z0-9]+", "_", name.rpartition(".")[0]).strip("_")
    return f"{number:08d}-{readable[-60:]}"


def _write_lists(
    folder: Path,
    config: MakeShards,
    shards: Sequence[ManifestShard],
    class_names: list[str] | None,
    rejected: Sequence[Rejected],
) -> None:
    write_text(folder / REJECTED_FILE, "".join(json.dumps(asdict(entry)) + "\n" for entry in rejected))
    source: dict[str, str | int | None] = {
        "source": config.source,
        "prefix": config.prefix,
        "split": (config.split or "train") if config.source == "digits" else None,
        "labels": config.labels,
        "shuffle_seed": config.shuffle_seed,
        "short_side": config.short_side,
        "quality": None if config.packing is None else config.packing.quality,
    }
    write_manifest(folder, Manifest(class_names, shards, source, len(rejected)))


def _report(
    config: MakeShards, shards: Sequence[ManifestShard], class_names: list[str] | None, rejected: Sequence[Rejected]
) -> None:
    classes = "without labels"
    if class_names is not None:
        shown = ", ".join(class_names[:3]) + (", ..." if len(class_names) > 3 else "")
        classes = f"in {len(class_names)} {'class' if len(class_names) == 1 else 'classes'} ({shown})"
    megabytes = sum(shard.bytes for shard in shards) / 1e6
    print(
        f"{sum(shard.samples for shard in shards):,} images {classes} -> "
        f"{len(shards)} shard{'s' * (len(shards) != 1)}, {megabytes:.1f} MB, "
        f"in {config.output}"
    )
    if rejected:
        print(
            f"{len(rejected):,} files left out, for example '{rejected[0].file}' ({rejected[0].reason}); "
            f"all are listed in {config.output / REJECTED_FILE}"
        )


def command(name: str = "python -m data_tools.make_shards") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(MakeShards, make_shards, command=name)
