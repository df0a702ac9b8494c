"""Images -> WebDataset shards: checked, shuffled as a whole, cut into tar files, listed in a manifest.

python -m data_tools.make_shards source=FOLDER|ZIP|digits output=DIR [prefix=train/]
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from webdataset import TarWriter

from data_tools.output import REJECTED_FILE, output_in_the_making
from data_tools.processes import map_in_processes
from data_tools.sources import Source, UnreadableFileError, open_source
from ssl_pipeline.config import Config, run_command
from ssl_pipeline.data.decode import DecodeError, decode_image, image_extension
from ssl_pipeline.data.index import IMAGE_EXTENSIONS
from ssl_pipeline.data.manifest import Manifest, ManifestShard, write_manifest
from ssl_pipeline.data.sampling import permutation
from ssl_pipeline.data.shards import DataError, open_shards

CHUNK = 200  # files per task of the check


class MakeShards(Config):
    """Write the images of a folder, a zip or scikit-learn's digits into WebDataset shards.

    Class folders become labels, a flat folder has none. Image files are stored as they are. Files that cannot be
    decoded are left out and listed in rejected.jsonl.
    """

    source: str
    """Folder, zip file, or the word digits."""
    output: Path
    """Directory to write; it appears when everything is done."""
    prefix: str = ""
    """Take only what lies below this folder of the source, e.g. train/."""
    split: Literal["train", "test"] | None = None
    """Part of source=digits; train if not given."""
    samples_per_shard: Annotated[int, Field(ge=1)] = 1000
    """Images per shard."""
    shuffle_seed: Annotated[int, Field(ge=0)] = 0
    """Another number gives another order."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes; by default one per core, at most 16."""
    overwrite: bool = False
    """Replace shards that an earlier run wrote to the same output."""


@dataclass(frozen=True)
class Candidate:
    """A file of the source that looks like an image, and its class."""

    name: str
    label: int | None


@dataclass(frozen=True)
class Rejected:
    """A file that is left out."""

    file: str
    reason: str


def make_shards(config: MakeShards) -> int:
    """Write the shards, the manifest, the index and the list of rejected files; returns the exit code."""
    source = open_source(config.source, config.prefix, config.split)
    candidates, class_names, rejected = find_candidates(source)
    if not candidates:
        raise DataError(
            f"source='{config.source}' has no image file (.jpg .jpeg .png .webp) among {len(rejected)} files. "
            "Is prefix= missing?"
        )
    with output_in_the_making(config.output, overwrite=config.overwrite) as folder:
        accepted, undecodable = _check(source, candidates, config.workers)
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


def find_candidates(source: Source) -> tuple[list[Candidate], list[str] | None, list[Rejected]]:
    """Image files with their labels, the class names, and what is no image file.

    Classes are the top folders, sorted, the empty ones among them; without any, no image has a label.
    """
    images, others = dict[str, list[str]](), list[Rejected]()
    for name in source.names():
        parts = _parts(name)
        if not parts or _is_hidden(parts):
            others.append(Rejected(name, "hidden file"))
        elif Path(parts[-1]).suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
            others.append(Rejected(name, "no image file"))
        else:
            images[name] = parts
    if all(len(parts) == 1 for parts in images.values()):
        return [Candidate(name, None) for name in images], None, others
    folders = [parts for parts in map(_parts, source.folders()) if parts and not _is_hidden(parts)]
    class_names = sorted({parts[0] for parts in images.values() if len(parts) > 1} | {parts[0] for parts in folders})
    labels = {name: label for label, name in enumerate(class_names)}
    others += [Rejected(name, "outside the class folders") for name, parts in images.items() if len(parts) == 1]
    candidates = [Candidate(name, labels[parts[0]]) for name, parts in images.items() if len(parts) > 1]
    return candidates, class_names, others


def _parts(name: str) -> list[str]:
    """Folders and file of a name; `/`, `.` and `..` only move about and are no part of it."""
    return [part for part in name.split("/") if part not in ("", ".", "..")]


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _check(
    source: Source, candidates: Sequence[Candidate], workers: int | None
) -> tuple[list[tuple[Candidate, str]], list[Rejected]]:
    """Candidates that decode, each with the extension that its content calls for, and the others with the reason."""
    chunks = [candidates[start : start + CHUNK] for start in range(0, len(candidates), CHUNK)]
    results = map_in_processes(
        partial(_check_chunk, source),
        chunks,
        sizes=[len(chunk) for chunk in chunks],
        workers=workers,
        description="checking images",
    )
    checked = list(zip(candidates, (result for chunk in results for result in chunk), strict=True))
    accepted = [(candidate, extension) for candidate, (extension, _) in checked if extension]
    return accepted, [Rejected(candidate.name, reason) for candidate, (extension, reason) in checked if not extension]


def _check_chunk(source: Source, candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    """(extension, "") for each image that decodes, ("", reason) for the others."""
    results = []
    for candidate in candidates:
        try:
            data = source.read(candidate.name)
            decode_image(data)
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
        partial(write_shard, source),
        tasks,
        sizes=[len(part) for _, _, part in tasks],
        workers=config.workers,
        description="writing shards",
    )


def write_shard(source: Source, task: tuple[Path, int, Sequence[tuple[Candidate, str]]]) -> ManifestShard:
    """Write one tar: its path, the number of its first sample, and its files with their extensions."""
    path, start, samples = task
    with path.open("wb") as file:
        # times and owners are fixed: the same images and seed give the same bytes
        with TarWriter(file, encoder=False, user="", group="", mtime=0) as writer:
            for number, (candidate, extension) in enumerate(samples, start):
                try:
                    image = source.read(candidate.name)
                except UnreadableFileError as error:
                    raise DataError(
                        f"'{candidate.name}' became unreadable while shards were written: {error}."
                    ) from None
                label = {} if candidate.label is None else {"cls": str(candidate.label).encode()}
                writer.write({"__key__": key_of(number, candidate.name), extension: image, **label})
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ManifestShard(path.name, len(samples), path.stat().st_size, sha256)


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
    with (folder / REJECTED_FILE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(entry)) + "\n" for entry in rejected)
    source: dict[str, str | int | None] = {
        "source": config.source,
        "prefix": config.prefix,
        "split": (config.split or "train") if config.source == "digits" else None,
        "shuffle_seed": config.shuffle_seed,
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


if __name__ == "__main__":
    sys.exit(run_command(MakeShards, make_shards, command="python -m data_tools.make_shards"))
