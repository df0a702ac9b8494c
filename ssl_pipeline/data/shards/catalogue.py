"""The index of a set of shards, kept next to them: `index.json`, a column per fact, and the rows of each as .npy."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ssl_pipeline.config import bar_interval
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.listing import ShardList
from ssl_pipeline.data.shards.rows import COLUMNS, ShardEntry, index_shard
from ssl_pipeline.data.shards.table import ShardTable
from ssl_pipeline.files import read_array, sha256_of_bytes, write_array, write_json
from ssl_pipeline.machine import whole_cores

INDEX_DIRECTORY = ".index"
INDEX_FILE = "index.json"
INDEX_FORMAT = 5
EARLIER_FORMATS = (1, 2, 3, 4)  # without sizes, with some not turned, without counts of what is passed over

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


def find_index(listed: ShardList, image_key: str | None) -> Path:
    """The index directory of these shards: the one that exists and can be used, otherwise the first that can be
    written. The places are `.index` next to the shards and the user's cache; shards of several folders have theirs in
    the cache. A selection of shards, or of images in them, has its own index.
    """
    folder, selection = listed.folder, listed.selection + ("" if image_key is None else f"\0{image_key}")
    suffix = f"-{sha256_of_bytes(selection.encode())[:8]}" if selection else ""
    absolute = folder.resolve()
    in_cache = user_cache() / f"{absolute.name}-{sha256_of_bytes(os.fsencode(absolute))[:16]}{suffix}"
    places = [folder / f"{INDEX_DIRECTORY}{suffix}", in_cache] if listed.in_one_folder else [in_cache]
    for place in places:
        if (place / INDEX_FILE).is_file() and (os.access(place, os.W_OK) or read_catalogue(place) is not None):
            return place
    for place in places:
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    tried = "' nor '".join(map(str, places))
    raise DataError(
        f"The index of '{folder}' needs a place: neither '{tried}' can be written. "
        "Set XDG_CACHE_HOME to a directory that you can write to."
    )


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "ssl_pipeline"


def build_index(listed: ShardList, place: Path, image_key: str | None) -> Catalogue:
    """Index every shard into the directory `place`; `index.json` comes last, so an incomplete index does not count."""
    place.mkdir(parents=True, exist_ok=True)
    say_if_made_again(place)
    path_of = {listed.folder / name: name for name in listed.names}

    def index_and_write(path: Path) -> ShardEntry:
        entry, rows = index_shard(path, path_of[path], image_key=image_key)
        write_rows(place, path_of[path], rows)
        return entry

    entries = map_shards(index_and_write, list(path_of), description="indexing shards")
    if not any(entry.samples for entry in entries):
        raise no_samples(str(listed.folder), entries)
    catalogue = Catalogue(ShardTable.of(entries))
    write_catalogue(place, catalogue)
    return catalogue


def say_if_made_again(place: Path) -> None:
    """Log one line, if an index of an earlier format is about to be replaced."""
    if (place / INDEX_FILE).is_file():
        logger.warning("The index '%s' is from an earlier version and is rebuilt.", place)


def no_samples(source: str, entries: Sequence[ShardEntry]) -> DataError:
    example = max(entries, key=lambda entry: entry.passed_over).example
    several = "s" * (len(entries) != 1)
    return DataError(f"'{source}' holds {len(entries)} shard{several} but no sample.{f' {example}' if example else ''}")


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
            raise DataError(f"The index '{place}' has another format. Delete it; it is rebuilt at the next start.")
        names = content["class_names"]
        if not isinstance(names, list | None):
            raise TypeError("class_names must be a list")
        table = ShardTable.from_columns(content["shards"])
        return Catalogue(table, content["manifest"], None if names is None else tuple(map(str, names)))
    except FileNotFoundError:
        return None
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"The index '{place}' cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise DataError(f"The index '{place}' is damaged. Delete it; it is rebuilt at the next start.") from None


def read_rows(place: Path, entry: ShardEntry) -> NDArray[np.int64]:
    """The rows of one shard, mapped from the file rather than read."""
    path = _rows_file(place, entry.name)
    rows = read_array(path, mapped=entry.samples > 0)
    if rows is None or rows.shape != (entry.samples, COLUMNS) or rows.dtype != np.int64:
        raise DataError(f"The index file '{path}' is damaged. Delete '{place}'; it is rebuilt at the next start.")
    return rows


def map_shards(function: Callable[[Path], Result], shards: Sequence[Path], *, description: str) -> list[Result]:
    """`function` of every shard, several at a time, with a progress bar where there is something to wait for."""
    total = sum(shard.stat().st_size for shard in shards)
    threads, interval = min(8, whole_cores()), bar_interval()
    with (
        tqdm(
            total=total, desc=description, unit="B", unit_scale=True, leave=False, delay=1.0, mininterval=interval
        ) as bar,
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


def write_rows(place: Path, name: str, rows: NDArray[np.int64]) -> None:
    write_array(_rows_file(place, name), rows, durable=False)


def _rows_file(place: Path, name: str) -> Path:
    return place / f"{name.replace('/', '%2F')}.npy"
