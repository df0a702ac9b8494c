"""Shards that are open: the files and the mapped rows of those that were read last."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.catalogue import read_rows
from ssl_pipeline.data.shards.remote import RemoteShards
from ssl_pipeline.data.shards.rows import key_at
from ssl_pipeline.data.shards.table import ShardTable
from ssl_pipeline.data.shards.verification import shard_changed

OPEN_SHARDS = 64  # per process


class OpenShards:
    """The shards of a table, by number; cheap to copy into a worker, because a copy has none of them open."""

    def __init__(self, folder: Path, place: Path, table: ShardTable, remote: RemoteShards | None) -> None:
        self.source = str(folder) if remote is None else remote.url
        self.folder = folder
        self.place = place
        self.table = table
        self.remote = remote
        self.files: OrderedDict[int, BinaryIO] = OrderedDict()
        self.mapped: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"files": OrderedDict(), "mapped": OrderedDict()}

    def rows(self, number: int) -> NDArray[np.int64]:
        """The rows of a shard (samples, 6), mapped from their file; the shard itself is not touched, nor fetched."""
        if number not in self.mapped:
            if len(self.mapped) >= OPEN_SHARDS:
                self.mapped.popitem(last=False)
            # plain arrays on the mapping: those of numpy's own class take twice as long to index
            self.mapped[number] = read_rows(self.place, self.table[number]).view(np.ndarray)
        self.mapped.move_to_end(number)
        return self.mapped[number]

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Some bytes of a shard; DataError if it cannot be read, or is not what it was."""
        name, file = self.table.name[number], self._file(number)
        if not 0 <= offset <= offset + size <= int(self.table.bytes[number]):
            raise DataError(f"The index of shard '{name}' is damaged. Delete '{self.place}' to index again.")
        try:
            content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"Cannot read shard '{self.source}/{name}' at byte {offset}: {error.strerror}.") from None
        if len(content) != size:
            raise shard_changed(f"{self.source}/{name}", self.place)
        return content

    def key(self, number: int, start: int) -> str:
        """The key of the member of a shard whose tar header begins at byte `start`."""
        with mmap.mmap(self._file(number).fileno(), 0, access=mmap.ACCESS_READ) as data:
            return key_at(data, start, shard=self.table.name[number])

    def _file(self, number: int) -> BinaryIO:
        if number in self.files:
            self.files.move_to_end(number)
            return self.files[number]
        entry = self.table[number]
        while self.files and not self._room_for(entry.bytes):
            self.files.popitem(last=False)[1].close()
        try:
            if self.remote is None:
                file: BinaryIO = (self.folder / entry.name).open("rb", buffering=0)
            else:
                file = self.remote.open(entry)
        except OSError as error:
            raise DataError(f"Cannot open shard '{self.source}/{entry.name}': {error.strerror}.") from None
        if os.fstat(file.fileno()).st_size != entry.bytes:
            raise shard_changed(f"{self.source}/{entry.name}", self.place)
        self.files[number] = file
        return file

    def _room_for(self, size: int) -> bool:
        """Whether one more shard may be open; of a remote set no more than the cache holds."""
        if self.remote is None:
            return len(self.files) < OPEN_SHARDS
        held = sum(int(self.table.bytes[number]) for number in self.files)
        return len(self.files) < OPEN_SHARDS and held + size <= self.remote.cache_bytes
