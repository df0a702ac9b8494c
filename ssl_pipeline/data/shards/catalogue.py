"""The index of a set of shards, kept beside them: `index.json`, a column per fact, and the rows of each as .npy."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.rows import COLUMNS, ShardEntry, index_shard
from ssl_pipeline.data.shards.table import ShardTable
from ssl_pipeline.files import sha256_of_bytes, write_array, write_json

INDEX_DIRECTORY = ".index"
INDEX_FILE = "index.json"
INDEX_FORMAT = 4
EARLIER_FORMATS = (1, 2, 3)  # the first two without the sizes of the images, the third with some that were not turned

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Catalogue:
    """What `index.json` holds.

    `manifest` is the SHA-256 of the manifest that the shards were last compared with, "" if there was none, None if
    they were not compared; `class_names` are that manifest's.
    """

    table: ShardTable
    manifest: str | None = None
    class_names: tuple[str, ...] | None = None


def list_shards(directory: str | Path) -> tuple[Path, list[str]]:
    """The folder and the names of its shards, sorted; raises DataError if there are none."""
    path = Path(directory)
    folder, pattern = (path, "*.tar") if path.is_dir() else (path.parent, path.name)
    if not path.is_dir() and not (folder.is_dir() and any(sign in pattern for sign in "*?[")):
        raise DataError(f"There is no directory '{path}'. Needed: a directory of .tar shards, or DIR/PREFIX-*.tar.")
    matches = re.compile(fnmatch.translate(pattern)).match
    with os.scandir(folder) as found:  # tells files from folders without asking for each
        names = sorted(
            entry.name for entry in found if matches(entry.name) and not entry.name.startswith(".") and entry.is_file()
        )
    if not names:
        packed = next(folder.glob("*.t*gz"), None)
        hint = f" '{packed.name}' is compressed: unpack it first." if packed else ""
        raise DataError(f"'{path}' holds no .tar shard.{hint} Make some: python -m data_tools.make_shards --help")
    return folder, names


def find_index(folder: Path, pattern: str) -> Path:
    """The index directory of these shards: the one that exists and can be used, else the first that can be written.

    The places are `.index` beside the shards and the user's cache; a pattern of shards has an index of its own.
    """
    suffix = f"-{sha256_of_bytes(pattern.encode())[:8]}" if pattern else ""
    absolute = folder.resolve()
    in_cache = f"{absolute.name}-{sha256_of_bytes(os.fsencode(absolute))[:16]}{suffix}"
    places = (folder / f"{INDEX_DIRECTORY}{suffix}", user_cache() / in_cache)
    for place in places:
        if (place / INDEX_FILE).is_file() and (os.access(place, os.W_OK) or read_catalogue(place) is not None):
            return place
    for place in places:
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise DataError(
        f"The index of '{folder}' needs a place: neither '{places[0]}' nor '{places[1]}' can be written. "
        "Set XDG_CACHE_HOME to a directory of yours."
    )


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "ssl_pipeline"


def build_index(folder: Path, names: Sequence[str], place: Path) -> Catalogue:
    """Index every shard into the directory `place`; `index.json` comes last, so a torn index is no index."""
    place.mkdir(parents=True, exist_ok=True)
    say_if_made_again(place)
    entries = map_shards(_index_into(place), [folder / name for name in names], description="indexing shards")
    if not any(entry.samples for entry in entries):
        raise no_samples(str(folder), len(names))
    catalogue = Catalogue(ShardTable.of(entries))
    write_catalogue(place, catalogue)
    return catalogue


def say_if_made_again(place: Path) -> None:
    """One line for who waits, if an index of an earlier format is about to be replaced."""
    if (place / INDEX_FILE).is_file():
        logger.warning("The index '%s' is of an earlier version: it is made again.", place)


def no_samples(source: str, shards: int) -> DataError:
    return DataError(f"'{source}' holds {shards} shard{'s' * (shards != 1)} and no sample.")


def write_catalogue(place: Path, catalogue: Catalogue) -> None:
    names = None if catalogue.class_names is None else list(catalogue.class_names)
    content = {"format": INDEX_FORMAT, "manifest": catalogue.manifest, "class_names": names}
    write_json(place / INDEX_FILE, content | {"shards": catalogue.table.columns()})


def read_catalogue(place: Path) -> Catalogue | None:
    """What an index directory holds; None without an index, or with one of an earlier format. DataError if damaged."""
    try:
        content = json.loads((place / INDEX_FILE).read_text(encoding="utf-8"))
        if content["format"] in EARLIER_FORMATS:
            return None
        if content["format"] != INDEX_FORMAT:
            raise DataError(f"The index '{place}' has another format. Delete it; it is made again at the next start.")
        names = content["class_names"]
        table = ShardTable.from_columns(content["shards"])
        return Catalogue(table, content["manifest"], None if names is None else tuple(map(str, names)))
    except FileNotFoundError:
        return None
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError):
        raise DataError(f"The index '{place}' is damaged. Delete it; it is made again at the next start.") from None


def read_rows(place: Path, entry: ShardEntry) -> NDArray[np.int64]:
    """The rows of one shard, mapped from the file rather than read."""
    path = place / f"{entry.name}.npy"
    try:
        rows = np.load(path, mmap_mode="r" if entry.samples else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        rows = None
    if not isinstance(rows, np.ndarray) or rows.shape != (entry.samples, COLUMNS) or rows.dtype != np.int64:
        raise DataError(f"The index file '{path}' is damaged. Delete '{place}'; it is made again at the next start.")
    return rows


def map_shards(function: Callable[[Path], Result], shards: Sequence[Path], *, description: str) -> list[Result]:
    """`function` of every shard, several at a time, with a progress bar where there is something to wait for."""
    total = sum(shard.stat().st_size for shard in shards)
    threads = min(8, os.cpu_count() or 1)
    with (
        tqdm(total=total, desc=description, unit="B", unit_scale=True, leave=False, delay=1.0) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        futures = [pool.submit(function, shard) for shard in shards]
        results = []
        try:
            for shard, future in zip(shards, futures, strict=True):
                results.append(future.result())
                bar.update(shard.stat().st_size)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _index_into(place: Path) -> Callable[[Path], ShardEntry]:
    def index_and_write(shard: Path) -> ShardEntry:
        entry, rows = index_shard(shard)
        write_rows(place, shard.name, rows)
        return entry

    return index_and_write


def write_rows(place: Path, name: str, rows: NDArray[np.int64]) -> None:
    write_array(place / f"{name}.npy", rows, durable=False)
