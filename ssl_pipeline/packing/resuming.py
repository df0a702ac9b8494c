"""What make_shards keeps of interrupted work, and how it is found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ssl_pipeline.data.shards.manifest import ManifestShard
from ssl_pipeline.files import JSON, sha256_of_json
from ssl_pipeline.packing.candidates import Candidate
from ssl_pipeline.packing.engine import Journal
from ssl_pipeline.packing.output import UNFINISHED

Checked = list[tuple[str, str]]  # extension, or why there is none


def name_of_work(settings: Mapping[str, JSON], images: Sequence[Candidate]) -> str:
    """What identifies the making of these shards."""
    return sha256_of_json([settings, [[image.name, image.label] for image in images]])[:16]


def check_journal(folder: Path, work: str | None) -> Journal[Checked] | None:
    """What the check of each chunk found; None for work that is not kept."""
    return None if work is None else Journal(folder / f"{UNFINISHED}check", work, lambda found: found, _pairs)


def shard_journal(folder: Path, work: str | None) -> Journal[ManifestShard] | None:
    """The shards that are written; None for work that is not kept."""
    return None if work is None else Journal(folder / f"{UNFINISHED}shards", work, asdict, partial(_written, folder))


def _pairs(found: JSON) -> Checked:
    return [(str(extension), str(reason)) for extension, reason in found]  # type: ignore[union-attr,misc]


def _written(folder: Path, entry: JSON) -> ManifestShard:
    """A shard of the journal; ValueError if it is not there as it was written."""
    shard = ManifestShard(**entry)  # type: ignore[arg-type]
    path = folder / shard.name
    if not path.is_file() or path.stat().st_size != shard.bytes:
        raise ValueError(f"{path} is not what was written")
    return shard
