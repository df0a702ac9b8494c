"""Where the images of shards came from: `files.jsonl` next to them, a line per image in the order of the shards.

make_shards gives image n a key that begins with n in eight digits, and line n (from 0) of `files.jsonl` holds that key
and the name of the file in the source: {"key": "00000007-cat_été", "file": "cat/été.jpg"}.

Shards that a command packs for itself (packing/packed_once.py) have LISTING next to their folder. Their user knows the
folder or the zip of images, not the shards, so errors name what was packed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.listing import ShardSource
from ssl_pipeline.data.shards.manifest import read_manifest
from ssl_pipeline.files import write_text

ORIGINS_FILE = "files.jsonl"
LISTING = "images.jsonl"


def display_name(source: ShardSource) -> str:
    """What errors call the images of shards: the folder, zip or image that a command packed into them for itself, or
    the shards that were given.
    """
    if isinstance(source, str | Path):
        return packed_from(Path(source)) or str(source)
    return ", ".join(display_name(one) for one in source)


def packed_from(shards: Path) -> str | None:
    """The folder, zip or image that a command packed into these shards for itself; None for any others."""
    if not (shards.parent / LISTING).is_file():
        return None
    with suppress(DataError, OSError):
        manifest = read_manifest(shards)
        source = None if manifest is None else manifest.source.get("source")
        return None if source is None else str(source)
    return None


def write_origins(folder: Path, origins: Iterable[tuple[str, str]]) -> None:
    """Write the key and the file of every image, in the order of the shards."""
    lines = (json.dumps({"key": key, "file": file}) + "\n" for key, file in origins)
    write_text(folder / ORIGINS_FILE, "".join(lines))


def origin_of(folder: Path, key: str) -> str | None:
    """The file that the image of a key was made from; None where no list says so."""
    number = _number_in(key)
    if number is None:
        return None
    try:
        with (folder / ORIGINS_FILE).open(encoding="utf-8") as file:
            return _file_in(next(islice(file, number, None), ""), key)
    except (OSError, ValueError):
        return None


def origins_of(folder: Path, keys: Iterable[str]) -> Iterator[str | None]:
    """`origin_of` for each of many keys; the list is read once where they come in its order."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context((folder / ORIGINS_FILE).open(encoding="utf-8"))
        except OSError:
            yield from (None for _ in keys)
            return
        next_line = 0
        for key in keys:
            number = _number_in(key)
            if number is None or number < next_line:
                yield origin_of(folder, key)
                continue
            try:
                line = next(islice(file, number - next_line, None), "")
            except ValueError:  # no UTF-8
                line = ""
            next_line = number + 1
            yield _file_in(line, key)


def _number_in(key: str) -> int | None:
    number = key.partition("-")[0]
    return int(number) if number.isascii() and number.isdigit() and len(number) < 19 else None


def _file_in(line: str, key: str) -> str | None:
    """The file that a line names, if it is about this key."""
    try:
        entry = json.loads(line)
        return str(entry["file"]) if entry["key"] == key else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
