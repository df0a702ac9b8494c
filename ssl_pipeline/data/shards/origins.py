"""Where the images of shards came from: `files.jsonl` beside them, a line per image in the order of the shards.

make_shards gives image n a key that begins with n in eight digits, and line n (from 0) of `files.jsonl` holds that key
and the name of the file in the source: {"key": "00000007-cat_été", "file": "cat/été.jpg"}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from ssl_pipeline.files import write_text

ORIGINS_FILE = "files.jsonl"


def write_origins(folder: Path, origins: Iterable[tuple[str, str]]) -> None:
    """Write the key and the file of every image, in the order of the shards."""
    lines = (json.dumps({"key": key, "file": file}) + "\n" for key, file in origins)
    write_text(folder / ORIGINS_FILE, "".join(lines))


def origin_of(folder: Path, key: str) -> str | None:
    """The file that the image of a key was made from; None where no list says so."""
    number = key.partition("-")[0]
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        return None
    try:
        with (folder / ORIGINS_FILE).open(encoding="utf-8") as file:
            line = next(islice(file, int(number), None), "")
        entry = json.loads(line)
        return str(entry["file"]) if entry["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
