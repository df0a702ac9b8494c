"""Verify shards: tar structure, manifest, and that every image decodes.

python -m data_tools.check_shards DIR
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from ssl_pipeline.config import Config, PlaceText, printable, run_command
from ssl_pipeline.data.decode import DecodeError, decode_image
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.listing import ShardList, list_shards
from ssl_pipeline.data.shards.manifest import MANIFEST_FILE, Manifest, ManifestShard, read_manifest, write_manifest
from ssl_pipeline.data.shards.rows import INVALID_LABEL, ShardEntry, index_shard, key_at
from ssl_pipeline.packing.engine import EngineConfig, map_tasks


class CheckShards(Config):
    """Verify the shards of a directory, made by make_shards or by others; the exit code is 1 if anything is wrong."""

    positional: ClassVar[str | None] = "directory"

    directory: PlaceText
    """Directory of .tar shards, or a pattern such as DIR/train-*.tar; the key may be left out."""
    decode: bool = True
    """Decode every image. Without it only the structure and the checksums are verified."""
    image_key: str | None = None
    """Extension of the image where samples have several, as data.image_key."""
    write_manifest: bool = False
    """Write the manifest.json by which shards made by others can be served over http, if none is damaged."""
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes; by default one per core, at most 16."""


@dataclass(frozen=True)
class Checked:
    """What was found in one shard; `entry` is None if its structure cannot be read."""

    entry: ShardEntry | None
    problems: list[str]
    passed_over: tuple[str, ...] = ()
    """What a run skips without stopping: samples without an image, labels that are no numbers."""


def check_shards(config: CheckShards) -> int:
    """Print every problem and a summary; returns 0 without problems, otherwise 1."""
    listed = list_shards(config.directory)
    folder, names = listed.folder, listed.names
    shards = [folder / name for name in names]
    manifest = read_manifest(folder)
    if config.write_manifest:
        _refuse_manifest(listed, manifest)
    checked = map_tasks(
        partial(check_shard, decode=config.decode, image_key=config.image_key),
        shards,
        sizes=[1] * len(shards),
        engine=EngineConfig(workers=config.workers),
        description="checking",
        unit="shard",
    )
    entries = [shard.entry for shard in checked if shard.entry is not None]
    problems = [problem for shard in checked for problem in shard.problems]
    if manifest is not None:
        problems += differences(entries, names, manifest, whole_folder=listed.whole_folder)
    passed_over = [problem for shard in checked for problem in shard.passed_over]
    for problem in (*passed_over, *problems):
        print(printable(problem))
    count = len(passed_over) + len(problems)
    images = sum(entry.samples for entry in entries)
    labelled = sum(entry.labelled for entry in entries)
    megabytes = sum(entry.bytes for entry in entries) / 1e6
    depth = "images were decoded" if config.decode else "no image was decoded"
    against = f"compared with {MANIFEST_FILE}" if manifest else f"no {MANIFEST_FILE}"
    print(
        f"{len(shards)} shard{'s' * (len(shards) != 1)}, {images:,} image{'s' * (images != 1)} "
        f"({labelled:,} with a label), {megabytes:.1f} MB; {depth}, {against}: "
        f"{count or 'no'} problem{'s' * (count != 1)}"
    )
    if config.write_manifest and not problems:
        listing = [ManifestShard(entry.name, entry.samples, entry.bytes, entry.sha256) for entry in entries]
        write_manifest(folder, Manifest(shards=listing))
        print(f"wrote {folder / MANIFEST_FILE}")
    elif config.write_manifest:
        print(f"no {MANIFEST_FILE} was written: shards with damage are not listed")
    return 1 if count else 0


def _refuse_manifest(listed: ShardList, manifest: Manifest | None) -> None:
    """Raise DataError unless a manifest can be written: one for the whole directory, where there is none."""
    if manifest is not None or (listed.folder / MANIFEST_FILE).exists():
        raise DataError(f"'{listed.folder}' has a {MANIFEST_FILE} already. Delete it if it is to be made again.")
    if not listed.whole_folder:
        raise DataError("write_manifest=true lists all shards of a directory. Give the directory itself.")


def check_shard(path: Path, *, decode: bool, image_key: str | None = None) -> Checked:
    """One shard from end to end, every image of it if asked."""
    try:
        entry, rows = index_shard(path, image_key=image_key)
    except (DataError, OSError) as error:
        return Checked(None, [str(error)])
    problems, passed_over = list[str](), list[str]()
    if entry.passed_over:
        passed_over.append(
            f"{entry.example} ({entry.passed_over:,} of {entry.samples + entry.passed_over:,} samples are passed over)"
        )
    invalid = rows[rows[:, 2] == INVALID_LABEL]
    if len(invalid):
        first = _key(path, int(invalid[0, 3]))
        passed_over.append(
            f"Shard '{path.name}', key '{first}': a label that is not a 64-bit integer ({len(invalid):,} such labels)."
        )
    if decode:
        with path.open("rb") as file:
            for offset, size, _, start, *_ in rows.tolist():
                file.seek(offset)
                try:
                    decode_image(file.read(size))
                except DecodeError as error:
                    problems.append(f"Shard '{path.name}', key '{_key(path, start)}', byte {offset}: {error}.")
    return Checked(entry, problems, tuple(passed_over))


def _key(path: Path, start: int) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return key_at(data, start, shard=path.name)


def differences(
    entries: Sequence[ShardEntry], present: Sequence[str], manifest: Manifest, *, whole_folder: bool
) -> list[str]:
    """Where the shards are not those that the manifest lists."""
    listed = {shard.name: shard for shard in manifest.shards}
    problems = []
    for entry in entries:
        expected = listed.get(entry.name)
        if expected is None:
            problems.append(f"Shard '{entry.name}' is not in {MANIFEST_FILE}.")
        elif entry.sha256 != expected.sha256:
            problems.append(f"Shard '{entry.name}' is not the one that {MANIFEST_FILE} lists: its checksum differs.")
        elif (entry.samples, entry.bytes) != (expected.samples, expected.bytes):
            problems.append(
                f"Shard '{entry.name}' has {entry.samples:,} samples in {entry.bytes:,} bytes, but {MANIFEST_FILE} "
                f"says {expected.samples:,} in {expected.bytes:,}."
            )
    if whole_folder:
        missing = sorted(listed.keys() - set(present))
        problems += [f"Shard '{name}' is in {MANIFEST_FILE} but missing." for name in missing]
    return problems


def command(name: str = "python -m data_tools.check_shards") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(CheckShards, check_shards, command=name)
