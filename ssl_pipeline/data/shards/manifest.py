"""The manifest that data_tools.make_shards writes next to its shards; shards made by others need none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.files import write_json

MANIFEST_FILE = "manifest.json"
OWN_KEYS = {"samples", "bytes", "class_names", "shards", "source", "rejected"}
MAKE_MANIFEST = "python -m data_tools.check_shards DIR write_manifest=true writes one next to the shards."
LEAST_OWN_KEYS = 2  # of a manifest of ours; a file of that name may be another program's


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
    """Write `manifest.json`; counts and bytes of the whole are added for readers."""
    totals = {
        "samples": sum(shard.samples for shard in manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }
    write_json(folder / MANIFEST_FILE, totals | asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder of shards; None without one, or if the file is another program's."""
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
    """The manifest in a text; None if the text is another program's, DataError if it is damaged."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"'{where}' is not valid JSON. {_advice(where)}") from None
    if not isinstance(content, dict) or len(OWN_KEYS & content.keys()) < LEAST_OWN_KEYS:
        return None
    listed, names, source = content.get("shards"), content.get("class_names"), content.get("source")
    if not isinstance(listed, list):
        raise damaged_manifest(where, "it has no list of shards")
    shards = [_parse_shard(entry, number, where) for number, entry in enumerate(listed)]
    if len({shard.name for shard in shards}) != len(shards):
        raise damaged_manifest(where, "it lists a shard twice")
    for key in ("samples", "bytes"):
        total = sum(getattr(shard, key) for shard in shards)
        if content.get(key, total) != total:
            raise damaged_manifest(where, f"its shards have {total:,} {key}, but it says {str(content[key])[:50]!r}")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise damaged_manifest(where, "class_names must be a list of names")
    return Manifest(names, shards, source if isinstance(source, dict) else {})


def _parse_shard(entry: object, number: int, where: Path | str) -> ManifestShard:
    keys = [one.name for one in fields(ManifestShard)]
    if not isinstance(entry, dict) or entry.keys() != set(keys):
        raise damaged_manifest(where, f"shards[{number}] must have exactly the keys {', '.join(keys)}")
    for key in ("name", "sha256"):
        if not isinstance(entry[key], str):
            raise damaged_manifest(where, f"the {key} in shards[{number}] must be a string: {str(entry[key])[:50]!r}")
    for key in ("samples", "bytes"):
        if not isinstance(entry[key], int) or isinstance(entry[key], bool) or entry[key] < 0:
            raise damaged_manifest(where, f"{str(entry[key])[:50]!r} in shards[{number}] is not a number of {key}")
    return ManifestShard(**entry)


def damaged_manifest(where: Path | str, reason: str) -> DataError:
    """What is wrong with the manifest at a path or address, with what to do."""
    return DataError(f"'{where}' is damaged: {reason}. {_advice(where)}")


def is_http(url: str) -> bool:
    """Whether an address is one of http, which lists no files: only the manifest says which shards are there."""
    return url.partition("://")[0].lower() in ("http", "https")


def _advice(where: Path | str) -> str:
    if is_http(str(where)):
        return f"Over http it is needed: copy it there again, or delete it there. {MAKE_MANIFEST}"
    return "Copy it again, or delete it to use the shards without it."
