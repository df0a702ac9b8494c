"""The index of a set of shards, kept beside them: `index.json`, one entry per shard, and the rows of each as .npy."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ssl_pipeline.atomic import write_json
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.index import COLUMNS, ShardEntry, index_shard
from ssl_pipeline.data.manifest import MANIFEST_FILE, Manifest

INDEX_DIRECTORY = ".index"
INDEX_FILE = "index.json"
INDEX_FORMAT = 1

Result = TypeVar("Result")


def list_shards(directory: str | Path) -> tuple[Path, list[Path]]:
    """The folder and its shards by name; raises DataError if there are none."""
    path = Path(directory)
    folder, pattern = (path, "*.tar") if path.is_dir() else (path.parent, path.name)
    if not path.is_dir() and not (folder.is_dir() and any(sign in pattern for sign in "*?[")):
        raise DataError(f"There is no directory '{path}'. Needed: a directory of .tar shards, or DIR/PREFIX-*.tar.")
    shards = sorted(shard for shard in folder.glob(pattern) if shard.is_file() and not shard.name.startswith("."))
    if not shards:
        packed = next(folder.glob("*.t*gz"), None)
        hint = f" '{packed.name}' is compressed: unpack it first." if packed else ""
        raise DataError(f"'{path}' holds no .tar shard.{hint} Make some: python -m data_tools.make_shards --help")
    return folder, shards


def find_index(folder: Path, pattern: str) -> Path:
    """The index directory of these shards: the one that exists, else the first that can be written.

    The places are `.index` beside the shards and the user's cache; a pattern of shards has an index of its own.
    """
    suffix = f"-{hashlib.sha256(pattern.encode()).hexdigest()[:8]}" if pattern else ""
    absolute = folder.resolve()
    in_cache = f"{absolute.name}-{hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]}{suffix}"
    places = (folder / f"{INDEX_DIRECTORY}{suffix}", user_cache() / in_cache)
    for place in places:
        if (place / INDEX_FILE).is_file():
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


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold the index directory against other processes, where the file system can."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks here: two processes may make the same index, yet each file appears whole
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def unchanged(entries: list[ShardEntry], shards: Sequence[Path], place: Path) -> list[ShardEntry]:
    """The entries, after a comparison with the files; a copy with another time and equal content is no change."""
    known = {entry.name: entry for entry in entries}
    for name in [shard.name for shard in shards if shard.name not in known]:
        raise DataError(f"Shard '{name}' came after '{place}' was made. Delete that directory to index again.")
    missing = known.keys() - {shard.name for shard in shards}
    if missing:
        raise DataError(
            f"Shard '{min(missing)}' is gone from '{shards[0].parent}'. Copy it back, "
            f"or delete '{place}' to index again."
        )
    touched = []
    for shard in shards:
        status = shard.stat()
        if status.st_size != known[shard.name].bytes:
            raise shard_changed(shard, place)
        if status.st_mtime_ns != known[shard.name].modified_ns:
            touched.append(shard)
    if not touched:
        return entries
    for shard, sha256 in zip(touched, map_shards(_sha256, touched, description="verifying shards"), strict=True):
        if sha256 != known[shard.name].sha256:
            raise shard_changed(shard, place)
        known[shard.name] = replace(known[shard.name], modified_ns=shard.stat().st_mtime_ns)
    if os.access(place, os.W_OK):
        write_entries(place, list(known.values()))
    return list(known.values())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_changed(shard: Path | str, place: Path) -> DataError:
    return DataError(
        f"Shard '{shard}' changed since it was indexed. If that is meant, delete '{place}' to index again; "
        "otherwise copy the shard again."
    )


def compare_with_manifest(
    entries: Sequence[ShardEntry], manifest: Manifest, folder: Path, *, whole_folder: bool
) -> None:
    """Raise DataError unless shards that came with a manifest are those that it lists."""
    listed = {shard.name: shard for shard in manifest.shards}
    missing = listed.keys() - {entry.name for entry in entries}
    if missing and whole_folder:
        raise DataError(
            f"Shard '{min(missing)}' is in {MANIFEST_FILE} and not in '{folder}'. Copy it there, "
            f"or delete '{folder / MANIFEST_FILE}' to go on without it."
        )
    for entry in entries:
        if entry.name in listed and listed[entry.name].sha256 != entry.sha256:
            raise DataError(
                f"Shard '{folder / entry.name}' is not the one that {MANIFEST_FILE} lists. Copy it again, "
                f"or delete '{folder / MANIFEST_FILE}' if the change is meant."
            )


def build_index(shards: Sequence[Path], place: Path) -> None:
    """Index every shard into the directory `place`; `index.json` comes last, so a torn index is no index."""
    place.mkdir(parents=True, exist_ok=True)
    entries = map_shards(_index_into(place), shards, description="indexing shards")
    if not any(entry.samples for entry in entries):
        raise DataError(f"'{shards[0].parent}' holds {len(shards)} shards and no sample.")
    write_entries(place, entries)


def write_entries(place: Path, entries: Sequence[ShardEntry]) -> None:
    write_json(place / INDEX_FILE, {"format": INDEX_FORMAT, "shards": [asdict(entry) for entry in entries]})


def read_entries(place: Path) -> list[ShardEntry]:
    """The entries of an index directory; raises DataError if they cannot be read."""
    try:
        index = json.loads((place / INDEX_FILE).read_text(encoding="utf-8"))
        if index["format"] != INDEX_FORMAT:
            raise DataError(f"The index '{place}' has another format. Delete it; it is made again at the next start.")
        return [ShardEntry(**entry) for entry in index["shards"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
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
    aside = place / f".{name}.{os.getpid()}.tmp"
    with aside.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    aside.replace(place / f"{name}.npy")
