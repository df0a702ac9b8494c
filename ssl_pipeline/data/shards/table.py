"""What is known of every shard of a set, a column each: 100,000 shards are read in a tenth of a second."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.data.shards.rows import ShardEntry


@dataclass(frozen=True, eq=False)
class ShardTable:
    """One `ShardEntry` per shard, in the order of their names; no object per shard, so workers share its memory."""

    name: tuple[str, ...]
    bytes: NDArray[np.int64]
    modified_ns: NDArray[np.int64]
    sha256: tuple[str, ...]
    samples: NDArray[np.int64]
    labelled: NDArray[np.int64]
    image_bytes: NDArray[np.int64]
    pixel_bytes: NDArray[np.int64]
    widest: NDArray[np.int64]
    passed_over: NDArray[np.int64]
    other_files: NDArray[np.int64]
    example: tuple[str, ...]

    @classmethod
    def of(cls, entries: Sequence[ShardEntry]) -> ShardTable:
        return cls.from_columns({name: [getattr(entry, name) for entry in entries] for name in COLUMN_NAMES})

    @classmethod
    def from_columns(cls, columns: Mapping[str, list[str] | list[int]]) -> ShardTable:
        """The inverse of `columns`; raises KeyError, TypeError or ValueError for what does not come from there."""
        if len({len(columns[name]) for name in COLUMN_NAMES}) != 1:
            raise ValueError("columns of different lengths")
        for name in TEXT_COLUMNS:
            if not set(map(type, columns[name])) <= {str}:
                raise TypeError(f"{name} must be text")
        return cls(
            name=tuple(map(str, columns["name"])),
            bytes=_numbers(columns["bytes"]),
            modified_ns=_numbers(columns["modified_ns"], signed=True),
            sha256=tuple(map(str, columns["sha256"])),
            samples=_numbers(columns["samples"]),
            labelled=_numbers(columns["labelled"]),
            image_bytes=_numbers(columns["image_bytes"]),
            pixel_bytes=_numbers(columns["pixel_bytes"]),
            widest=_numbers(columns["widest"]),
            passed_over=_numbers(columns["passed_over"]),
            other_files=_numbers(columns["other_files"]),
            example=tuple(map(str, columns["example"])),
        )

    def columns(self) -> dict[str, list[str] | list[int]]:
        """Lists for JSON."""
        return {
            name: list(getattr(self, name)) if name in TEXT_COLUMNS else getattr(self, name).tolist()
            for name in COLUMN_NAMES
        }

    def __len__(self) -> int:
        return len(self.name)

    def __getitem__(self, shard: int) -> ShardEntry:
        return ShardEntry(
            name=self.name[shard],
            bytes=int(self.bytes[shard]),
            modified_ns=int(self.modified_ns[shard]),
            sha256=self.sha256[shard],
            samples=int(self.samples[shard]),
            labelled=int(self.labelled[shard]),
            image_bytes=int(self.image_bytes[shard]),
            pixel_bytes=int(self.pixel_bytes[shard]),
            widest=int(self.widest[shard]),
            passed_over=int(self.passed_over[shard]),
            other_files=int(self.other_files[shard]),
            example=self.example[shard],
        )

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[shard] for shard in range(len(self)))


def _numbers(values: list[str] | list[int], *, signed: bool = False) -> NDArray[np.int64]:
    """A column; TypeError or ValueError for anything but whole numbers that fit."""
    numbers = np.array(values) if values else np.empty(0, dtype=np.int64)
    if numbers.dtype != np.int64 or numbers.ndim != 1:
        raise TypeError("not a column of whole numbers")
    if not signed and (numbers < 0).any():
        raise ValueError("negative numbers in a column of counts")
    return numbers


COLUMN_NAMES = tuple(field.name for field in fields(ShardEntry))
TEXT_COLUMNS = ("name", "sha256", "example")
