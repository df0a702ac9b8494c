"""The manifest that data_tools.make_shards writes beside its shards; shards made by others do without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.files import write_json

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class ManifestShard:
    """A shard as it was when it was written."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is in a set of shards and where it came from."""

    class_names: Sequence[str] | None = None
    shards: Sequence[ManifestShard] = ()
    source: dict[str, str | int | None] = field(default_factory=dict)
    rejected: int = 0


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; counts and bytes of the whole are added for whoever reads it."""
    totals = {
        "samples": sum(shard.samples for shard in manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }
    write_json(folder / MANIFEST_FILE, totals | asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder of shards; None without one, or if the file is somebody else's."""
    content = manifest_content(folder)
    return None if content is None else parse_manifest(content, folder / MANIFEST_FILE)


def manifest_content(folder: Path) -> bytes | None:
    """The manifest's bytes; None without one."""
    try:
        return (folder / MANIFEST_FILE).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"'{folder / MANIFEST_FILE}' cannot be read: {error.strerror}.") from None


def parse_manifest(text: bytes, where: Path | str) -> Manifest | None:
    """The manifest in a text; None if the text is somebody else's, DataError if it is damaged."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(
            f"'{where}' is not valid JSON. Copy it again, or delete it to use the shards without it."
        ) from None
    try:
        shards = [ManifestShard(**shard) for shard in content["shards"]]
        names, source = content["class_names"], content.get("source")
    except (KeyError, TypeError):
        return None
    for shard in shards:
        for value in (shard.name, shard.sha256):
            if not isinstance(value, str):
                raise _damaged(where, f"{str(value)[:50]!r} is no name of a shard, nor its SHA-256")
        for number in (shard.samples, shard.bytes):
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise _damaged(where, f"{str(number)[:50]!r} is no number of samples or bytes")
    if len({shard.name for shard in shards}) != len(shards):
        raise _damaged(where, "it lists a shard twice")
    if names is not None and not isinstance(names, list):
        raise _damaged(where, "class_names is no list")
    about = source if isinstance(source, dict) else {}
    return Manifest(None if names is None else [str(name) for name in names], shards, about)


def _damaged(where: Path | str, reason: str) -> DataError:
    return DataError(f"'{where}' is damaged: {reason}. Copy it again, or delete it to use the shards without it.")
