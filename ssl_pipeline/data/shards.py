"""WebDataset shards (plain tar files, https://github.com/webdataset/webdataset) read by sample number."""

import fcntl
import hashlib
import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.index import (
    INDEX_FILE,
    NO_LABEL,
    ShardEntry,
    build_index,
    map_shards,
    read_entries,
    read_rows,
    split_name,
    write_entries,
)
from ssl_pipeline.data.tar import walk

__all__ = ["MANIFEST_FILE", "DataError", "RawSample", "ShardIndex", "list_shards", "open_shards", "read_manifest"]

MANIFEST_FILE = "manifest.json"  # written by data_tools.make_shards; shards made by others have none
INDEX_DIRECTORY = ".index"
OPEN_SHARDS = 64  # per process


@dataclass(frozen=True)
class RawSample:
    """The stored bytes of one image; its key is read from the tar header only when somebody asks."""

    image: bytes
    label: int | None
    shard: str
    byte: int
    index: "ShardIndex"
    sample: int

    @property
    def key(self) -> str:
        return self.index.key(self.sample)

    @property
    def location(self) -> str:
        return f"{self.shard}, key '{self.key}', byte {self.byte}"


class ShardIndex:
    """Samples 0 to N-1 of a set of shards, in the order of the file names and then of the files.

    Cheap to copy into a worker: shards and index files are opened where they are first read.
    """

    def __init__(
        self, folder: Path, place: Path, entries: Sequence[ShardEntry], class_names: tuple[str, ...] | None
    ) -> None:
        self.folder = folder
        self.class_names = class_names
        self.shard_counts: NDArray[np.int64] = np.array([entry.samples for entry in entries], dtype=np.int64)
        self.has_labels = all(entry.labelled == entry.samples for entry in entries)
        self._place = place
        self._entries = tuple(entries)
        self._ends = np.cumsum(self.shard_counts)
        self._open: OrderedDict[int, tuple[BinaryIO, NDArray[np.int64]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, sample: int) -> RawSample:
        """The image bytes and the label (None without one) of sample 0 <= sample < N."""
        shard, row = self._row(sample)
        entry, (file, _) = self._entries[shard], self._open[shard]
        offset, size, label, _ = row
        try:
            image = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DataError(
                f"Cannot read shard '{self.folder / entry.name}' at byte {offset}: {error.strerror}."
            ) from None
        if len(image) != size:
            raise _changed(self.folder / entry.name, self._place)
        return RawSample(image, None if label == NO_LABEL else label, entry.name, offset, self, sample)

    def key(self, sample: int) -> str:
        """The key of a sample, read from its tar header."""
        shard, row = self._row(sample)
        name = self._entries[shard].name
        with mmap.mmap(self._open[shard][0].fileno(), 0, access=mmap.ACCESS_READ) as data:
            member = next(walk(data, shard=name, start=row[3]))
        return split_name(member.name)[0]

    def _row(self, sample: int) -> tuple[int, list[int]]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample must lie in [0, {len(self)}). Got {sample}.")
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        rows = self._opened(shard)[1]
        return shard, rows[sample - int(self._ends[shard] - self.shard_counts[shard])].tolist()

    def _opened(self, shard: int) -> tuple[BinaryIO, NDArray[np.int64]]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        entry = self._entries[shard]
        path = self.folder / entry.name
        try:
            file = path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"Cannot open shard '{path}': {error.strerror}.") from None
        if os.fstat(file.fileno()).st_size != entry.bytes:
            raise _changed(path, self._place)
        self._open[shard] = file, read_rows(self._place, entry)
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1][0].close()
        return self._open[shard]


def open_shards(directory: str | Path) -> ShardIndex:
    """The shards of a directory, or of a pattern such as `DIR/train-*.tar`.

    Where there is no index, one is made (in `DIR/.index`, or in the user's cache if DIR is read-only). Where there is
    one, every shard is checked against it: a shard that changed, came or went is a DataError. Safe to call from
    several processes at once: the first makes the index, the others wait for it.
    """
    folder, shards = list_shards(directory)
    manifest = read_manifest(folder)
    place = _find_index(folder, Path(directory).name if Path(directory) != folder else "")
    with _locked(place):
        if not (place / INDEX_FILE).is_file():
            build_index(shards, place)
        entries = _unchanged(read_entries(place), shards, place)
    _compare_with_manifest(entries, manifest, folder)
    names = manifest.get("class_names")
    return ShardIndex(folder, place, entries, tuple(map(str, names)) if isinstance(names, list) else None)


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


def read_manifest(folder: Path) -> dict[str, object]:
    """What `data_tools.make_shards` wrote beside its shards; empty for shards made by others."""
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DataError(
            f"'{path}' is not valid JSON. Copy it again, or delete it to use the shards without it."
        ) from None
    return manifest if isinstance(manifest, dict) else {}


def _find_index(folder: Path, pattern: str) -> Path:
    """The index directory of these shards: the one that exists, else the first that can be written."""
    suffix = f"-{hashlib.sha256(pattern.encode()).hexdigest()[:8]}" if pattern else ""
    beside = folder / f"{INDEX_DIRECTORY}{suffix}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_pipeline"
    absolute = folder.resolve()
    in_cache = cache / f"{absolute.name}-{hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]}{suffix}"
    for place in (beside, in_cache):
        if (place / INDEX_FILE).is_file():
            return place
    for place in (beside, in_cache):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise DataError(f"The index of '{folder}' needs a place: neither '{beside}' nor '{in_cache}' can be written.")


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the index directory against other processes, where the file system can."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks here: two processes may make the same index, yet each file appears whole
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _unchanged(entries: list[ShardEntry], shards: Sequence[Path], place: Path) -> list[ShardEntry]:
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
            raise _changed(shard, place)
        if status.st_mtime_ns != known[shard.name].modified_ns:
            touched.append(shard)
    if not touched:
        return entries
    for shard, sha256 in zip(touched, map_shards(_sha256, touched, description="verifying shards"), strict=True):
        if sha256 != known[shard.name].sha256:
            raise _changed(shard, place)
        known[shard.name] = replace(known[shard.name], modified_ns=shard.stat().st_mtime_ns)
    if os.access(place, os.W_OK):
        write_entries(place, list(known.values()))
    return list(known.values())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed(shard: Path, place: Path) -> DataError:
    return DataError(
        f"Shard '{shard}' changed since it was indexed. If that is meant, delete '{place}' to index again; "
        "otherwise copy the shard again."
    )


def _compare_with_manifest(entries: Sequence[ShardEntry], manifest: dict[str, object], folder: Path) -> None:
    """Shards that came with a manifest must be those that it lists."""
    listed = manifest.get("shards")
    expected = {shard["name"]: shard for shard in listed} if isinstance(listed, list) else {}
    for entry in entries:
        if entry.name in expected and expected[entry.name]["sha256"] != entry.sha256:
            raise DataError(
                f"Shard '{folder / entry.name}' is not the one that {MANIFEST_FILE} lists. Copy it again, "
                f"or delete '{folder / MANIFEST_FILE}' if the change is meant."
            )
