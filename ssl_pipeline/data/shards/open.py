"""WebDataset shards (plain tar files, https://github.com/webdataset/webdataset) read by sample number."""

import hashlib
import mmap
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.catalogue import Catalogue, find_index, list_shards, read_rows
from ssl_pipeline.data.shards.remote import RemoteShards, is_url, open_remote
from ssl_pipeline.data.shards.rows import NO_LABEL, ShardEntry, key_at
from ssl_pipeline.data.shards.verification import shard_changed, verified_catalogue

__all__ = ["DataError", "RawSample", "ShardIndex", "open_shards"]

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


@dataclass(frozen=True)
class OpenShard:
    """What reading from a shard takes."""

    entry: ShardEntry
    file: BinaryIO
    rows: NDArray[np.int64]


class ShardIndex:
    """Samples 0 to N-1 of a set of shards, in the order of the file names and then of the files.

    Cheap to copy into a worker: shards and index files are opened where they are first read.
    """

    def __init__(self, folder: Path, place: Path, catalogue: Catalogue, remote: RemoteShards | None = None) -> None:
        self.folder = folder
        self.source = str(folder) if remote is None else remote.url
        self.class_names = catalogue.class_names
        self.shard_counts = catalogue.table.samples
        self.has_labels = bool((catalogue.table.labelled == catalogue.table.samples).all())
        self._place = place
        self._remote = remote
        self._table = catalogue.table
        self._ends = np.cumsum(self.shard_counts)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, sample: int) -> RawSample:
        """The image bytes and the label (None without one) of sample 0 <= sample < N."""
        shard, (offset, size, label, _) = self._row(sample)
        entry, file = shard.entry, shard.file
        if not 0 <= offset <= offset + size <= entry.bytes:
            raise DataError(f"The index of shard '{entry.name}' is damaged. Delete '{self._place}' to index again.")
        try:
            image = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DataError(
                f"Cannot read shard '{self.source}/{entry.name}' at byte {offset}: {error.strerror}."
            ) from None
        if len(image) != size:
            raise shard_changed(f"{self.source}/{entry.name}", self._place)
        return RawSample(image, None if label == NO_LABEL else label, entry.name, offset, self, sample)

    def key(self, sample: int) -> str:
        """The key of a sample, read from its tar header."""
        shard, row = self._row(sample)
        with mmap.mmap(shard.file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return key_at(data, row[3], shard=shard.entry.name)

    @property
    def checksums(self) -> list[str]:
        """SHA-256 of each shard."""
        return list(self._table.sha256)

    @property
    def fingerprint(self) -> str:
        """One SHA-256 for the whole set: of other images, labels, encoding or shards it is another."""
        return hashlib.sha256("".join(self._table.sha256).encode()).hexdigest()

    def labels(self) -> NDArray[np.int64]:
        """The labels of all samples (N,), -1 for none; no image is read."""
        return np.concatenate([read_rows(self._place, entry)[:, 2] for entry in self._table])

    def check_cache(self, block_shards: int) -> None:
        """Raise DataError if the shards are remote and a block of them does not fit into the cache."""
        block = int(np.sort(self._table.bytes)[-block_shards:].sum())
        if self._remote is not None and block > self._remote.cache_bytes:
            raise DataError(
                f"A block of data.block_shards={block_shards} shards of '{self.source}' takes up to {block / 1e9:.3g} "
                f"GB, more than data.cache_gb={self._remote.cache_bytes / 1e9:g}. Raise it, or take smaller blocks."
            )

    def _row(self, sample: int) -> tuple[OpenShard, list[int]]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample must lie in [0, {len(self)}). Got {sample}.")
        number = int(np.searchsorted(self._ends, sample, side="right"))
        shard = self._opened(number)
        return shard, shard.rows[sample - int(self._ends[number] - self.shard_counts[number])].tolist()

    def _opened(self, number: int) -> OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        entry = self._table[number]
        while self._open and not self._room_for(entry):
            self._open.popitem(last=False)[1].file.close()
        try:
            if self._remote is None:
                file: BinaryIO = (self.folder / entry.name).open("rb", buffering=0)
            else:
                file = self._remote.open(entry)
        except OSError as error:
            raise DataError(f"Cannot open shard '{self.source}/{entry.name}': {error.strerror}.") from None
        if os.fstat(file.fileno()).st_size != entry.bytes:
            raise shard_changed(f"{self.source}/{entry.name}", self._place)
        self._open[number] = OpenShard(entry, file, read_rows(self._place, entry))
        return self._open[number]

    def _room_for(self, entry: ShardEntry) -> bool:
        """Whether one more shard may be open; of a remote set no more than the cache holds."""
        if self._remote is None:
            return len(self._open) < OPEN_SHARDS
        held = sum(shard.entry.bytes for shard in self._open.values())
        return len(self._open) < OPEN_SHARDS and held + entry.bytes <= self._remote.cache_bytes


def open_shards(directory: str | Path, *, cache_dir: Path | None = None, cache_gb: float = 50.0) -> ShardIndex:
    """The shards of a directory, of a pattern such as `DIR/train-*.tar`, or of a URL such as `s3://bucket/train`.

    Where there is no index, one is made (in `DIR/.index`, or in the user's cache if DIR is read-only). Where there is
    one, every shard is checked against it: a shard that changed, came or went is a DataError. Safe to call from
    several processes at once: the first makes the index, the others wait for it. Shards of a URL are fetched as they
    are read, into `cache_dir` (by default in the user's cache), of which at most `cache_gb` are kept.
    """
    if is_url(directory):
        remote = open_remote(str(directory), cache_dir=cache_dir, cache_gb=cache_gb)
        return ShardIndex(remote.place, remote.place, remote.catalogue(), remote)
    folder, names = list_shards(directory)
    whole_folder = folder == Path(directory)
    place = find_index(folder, "" if whole_folder else Path(directory).name)
    return ShardIndex(folder, place, verified_catalogue(folder, names, place, whole_folder=whole_folder))
