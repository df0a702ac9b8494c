"""Images -> tar files: their keys, and the list that leads from a key back to the file."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from webdataset import TarWriter

from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.manifest import ManifestShard
from ssl_pipeline.files import sha256_of, sync
from ssl_pipeline.packing.candidates import Candidate
from ssl_pipeline.packing.conversion import storable
from ssl_pipeline.packing.engine import EngineConfig, Journal, map_tasks
from ssl_pipeline.packing.reduced import Packing, pack
from ssl_pipeline.packing.sources import Readable, UnreadableFileError

NAME_LETTERS = 60  # of a file's name in its key; at most 240 bytes, since file systems end at 255

ALONE = EngineConfig(workers=1)
Accepted = tuple[Candidate, str]
"""An image that decodes, and the extension that its content calls for."""


def write_shards(
    source: Readable,
    samples: Sequence[Accepted],
    folder: Path,
    stem: str,
    *,
    samples_per_shard: int,
    packing: Packing | None,
    engine: EngineConfig = ALONE,
    journal: Journal[ManifestShard] | None = None,
) -> list[ManifestShard]:
    """Write FOLDER/STEM-000000.tar and so on, a shard at a time or several in the processes of an engine."""
    tasks = [
        (folder / f"{readable(stem) or 'shard'}-{start // samples_per_shard:06d}.tar", start, samples[start:end])
        for start, end in _slices(len(samples), samples_per_shard)
    ]
    return map_tasks(
        partial(_write_shard, source, packing=packing),
        tasks,
        sizes=[len(part) for _, _, part in tasks],
        engine=engine,
        description="writing shards",
        journal=journal,
    )


def _write_shard(
    source: Readable, task: tuple[Path, int, Sequence[Accepted]], *, packing: Packing | None
) -> ManifestShard:
    """Write one tar: its path, the number of its first sample, and its files, stored as they are or packed."""
    path, start, samples = task
    # times and owners are fixed: the same images and seed give the same bytes
    with path.open("wb") as file, TarWriter(file, encoder=False, user="", group="", mtime=0) as writer:
        for number, (candidate, extension) in enumerate(samples, start):
            try:
                image = storable(source.read(candidate.name))
                if packing is not None:
                    image, extension = pack(image, packing), "jpg"
            except (UnreadableFileError, DecodeError) as error:
                raise DataError(f"'{candidate.name}' became unreadable while shards were written: {error}.") from None
            label = {} if candidate.label is None else {"cls": str(candidate.label).encode()}
            writer.write({"__key__": key_of(number, candidate.name), extension: image, **label})
    sync(path)
    return ManifestShard(path.name, len(samples), path.stat().st_size, sha256_of(path))


def key_of(number: int, name: str) -> str:
    """A key that is unique by its number and recognisable by what is left of the file's name.

    WebDataset cuts a member's name at its first dot, and a slash would be a folder; letters of any script may stay.
    """
    return f"{number:08d}-{readable(name.rpartition('.')[0])[-NAME_LETTERS:].lstrip('_')}"


def readable(name: str) -> str:
    """The letters, marks and digits of a name; anything between them becomes one `_`."""
    letters = (
        letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in unicodedata.normalize("NFC", name)
    )
    return "_".join("".join(letters).split())


def _slices(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, count)) for start in range(0, count, size))
