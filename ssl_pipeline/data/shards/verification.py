"""Whether shards are still those of their index and of their manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.catalogue import (
    Catalogue,
    build_index,
    map_shards,
    read_catalogue,
    write_catalogue,
)
from ssl_pipeline.data.shards.listing import ShardList
from ssl_pipeline.data.shards.manifest import MANIFEST_FILE, Manifest, manifest_content, parse_manifest
from ssl_pipeline.data.shards.table import ShardTable
from ssl_pipeline.files import locked, sha256_of, sha256_of_bytes

STATUS_CHUNK = 500  # files
SLOW_STATUS = 5e-5  # seconds for a file: a network's answer, which threads wait for together (a local disk's is 3e-6)
STATUS_THREADS = 16


def verified_catalogue(listed: ShardList, place: Path, *, image_key: str | None = None) -> Catalogue:
    """The index in `place` of these shards, made where there is none; raises DataError if they are not its shards.

    Where nothing changed since the last time, a few operations on whole columns show it, and processes
    do not wait for each other.
    """
    folder, names = listed.folder, listed.names
    contents = _manifest_contents(listed)
    checksum = sha256_of_bytes(*contents.values()) if contents else ""
    found = read_catalogue(place)
    if found is not None and found.manifest == checksum and _is_current(found.table, folder, names):
        return found
    with locked(place):
        known = read_catalogue(place) or build_index(listed, place, image_key)
        table = unchanged(known.table, folder, names, place)
        if table is not known.table:  # whatever the manifest says, no shard is verified twice
            _keep(place, replace(known, table=table))
        class_names: tuple[str, ...] | None = None
        for beside, content in contents.items():
            manifest = parse_manifest(content, beside / MANIFEST_FILE)
            if manifest is None:
                continue
            compare_with_manifest(_shards_in(table, folder, beside), manifest, beside, whole=listed.whole_folder)
            own = None if manifest.class_names is None else tuple(manifest.class_names)
            if class_names is not None and own is not None and own != class_names:
                raise DataError(f"'{beside}' has other class names than the other shards of the list.")
            class_names = class_names if own is None else own
        catalogue = Catalogue(table, checksum, class_names)
        if known.manifest != checksum:
            _keep(place, catalogue)
    return catalogue


def _manifest_contents(listed: ShardList) -> dict[Path, bytes]:
    """The manifest next to the shards, or those of all folders that they lie in."""
    parents = {"."} if listed.in_one_folder else {name.rpartition("/")[0] or "." for name in listed.names}
    found = ((listed.folder / parent, manifest_content(listed.folder / parent)) for parent in sorted(parents))
    return {folder: content for folder, content in found if content is not None}


def _shards_in(table: ShardTable, folder: Path, beside: Path) -> dict[str, str]:
    """Name and SHA-256 of the shards in one folder."""
    start = "" if beside == folder else f"{beside.relative_to(folder).as_posix()}/"
    pairs = zip(table.name, table.sha256, strict=True)
    named = ((name.removeprefix(start), sha256) for name, sha256 in pairs if name.startswith(start))
    return {name: sha256 for name, sha256 in named if "/" not in name}


def _keep(place: Path, catalogue: Catalogue) -> None:
    if os.access(place, os.W_OK):  # else it is found out again at the next start
        write_catalogue(place, catalogue)


def _is_current(table: ShardTable, folder: Path, names: Sequence[str]) -> bool:
    if table.name != tuple(names):
        return False
    sizes, times = status_of(folder, names)
    return np.array_equal(sizes, table.bytes) and np.array_equal(times, table.modified_ns)


def status_of(folder: Path, names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bytes and time of modification in nanoseconds of each file."""
    descriptor = os.open(folder, os.O_RDONLY)

    def read(start: int) -> list[tuple[int, int]]:
        found = (os.stat(name, dir_fd=descriptor) for name in names[start : start + STATUS_CHUNK])
        return [(status.st_size, status.st_mtime_ns) for status in found]

    starts = range(STATUS_CHUNK, len(names), STATUS_CHUNK)
    try:
        began = time.perf_counter()
        parts = [read(0)]
        if time.perf_counter() - began > SLOW_STATUS * len(parts[0]):
            with ThreadPoolExecutor(STATUS_THREADS) as pool:
                parts += pool.map(read, starts)
        else:
            parts += map(read, starts)
    finally:
        os.close(descriptor)
    status = np.array([pair for part in parts for pair in part], dtype=np.int64).reshape(-1, 2)
    return status[:, 0], status[:, 1]


def unchanged(table: ShardTable, folder: Path, names: Sequence[str], place: Path) -> ShardTable:
    """The table, after a comparison with the files; a copy with another time and equal content is not a change."""
    for name in sorted(set(names) - set(table.name)):
        raise DataError(f"Shard '{name}' was added after '{place}' was made. Delete that directory to index again.")
    for name in sorted(set(table.name) - set(names)):
        raise DataError(f"Shard '{name}' is missing from '{folder}'. Copy it back, or delete '{place}' to index again.")
    sizes, times = status_of(folder, table.name)
    for shard in np.flatnonzero(sizes != table.bytes).tolist():
        raise shard_changed(folder / table.name[shard], place)
    touched = np.flatnonzero(times != table.modified_ns).tolist()
    if not touched:
        return table
    paths = [folder / table.name[shard] for shard in touched]
    for shard, path, sha256 in zip(
        touched, paths, map_shards(sha256_of, paths, description="verifying shards"), strict=True
    ):
        if sha256 != table.sha256[shard]:
            raise shard_changed(path, place)
    return replace(table, modified_ns=times)


def shard_changed(shard: Path | str, place: Path) -> DataError:
    return DataError(
        f"Shard '{shard}' changed since it was indexed. If that is meant, delete '{place}' to index again; "
        "otherwise copy the shard again."
    )


def compare_with_manifest(shards: Mapping[str, str], manifest: Manifest, folder: Path, *, whole: bool) -> None:
    """Raise DataError unless shards (name and SHA-256) that came with a manifest are those that it lists."""
    listed = {shard.name: shard.sha256 for shard in manifest.shards}
    missing = listed.keys() - shards.keys()
    if missing and whole:
        raise DataError(
            f"Shard '{min(missing)}' is in {MANIFEST_FILE} but not in '{folder}'. Copy it there, "
            f"or delete '{folder / MANIFEST_FILE}' to go on without it."
        )
    for name, sha256 in shards.items():
        if listed.get(name, sha256) != sha256:
            raise DataError(
                f"Shard '{folder / name}' is not the one that {MANIFEST_FILE} lists. Copy it again, "
                f"or delete '{folder / MANIFEST_FILE}' if the change is meant."
            )
