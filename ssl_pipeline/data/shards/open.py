"""WebDataset shards (plain tar files, https://github.com/webdataset/webdataset) read by sample number."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.catalogue import Catalogue, find_index, list_shards, read_rows
from ssl_pipeline.data.shards.opened import OpenShards
from ssl_pipeline.data.shards.remote import RemoteShards, is_url, open_remote
from ssl_pipeline.data.shards.rows import NO_LABEL, SIZE
from ssl_pipeline.data.shards.verification import verified_catalogue

__all__ = ["DataError", "RawSample", "ShardIndex", "open_shards"]


@dataclass(frozen=True)
class RawSample:
    """The stored bytes of one image; its key is read from the tar header only when somebody asks."""

    image: bytes
    label: int | None
    shard: str
    byte: int
    index: ShardIndex
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

    def __init__(self, folder: Path, place: Path, catalogue: Catalogue, remote: RemoteShards | None = None) -> None:
        self.folder = folder
        self.source = str(folder) if remote is None else remote.url
        self.class_names = catalogue.class_names
        self.shard_counts = catalogue.table.samples
        self.has_labels = bool((catalogue.table.labelled == catalogue.table.samples).all())
        self._table = catalogue.table
        self._shards = OpenShards(folder, place, catalogue.table, remote)
        self._ends = np.cumsum(self.shard_counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, sample: int) -> RawSample:
        """The image bytes and the label (None without one) of sample 0 <= sample < N."""
        shard, (offset, size, label, *_) = self._row(sample)
        image = self._shards.read(shard, offset, size)
        name = self._table.name[shard]
        return RawSample(image, None if label == NO_LABEL else label, name, offset, self, sample)

    def key(self, sample: int) -> str:
        """The key of a sample, read from its tar header."""
        shard, row = self._row(sample)
        return self._shards.key(shard, row[3])

    @property
    def checksums(self) -> list[str]:
        """SHA-256 of each shard."""
        return list(self._table.sha256)

    @property
    def fingerprint(self) -> str:
        """One SHA-256 for the whole set: of other images, labels, encoding or shards it is another."""
        return hashlib.sha256("".join(self._table.sha256).encode()).hexdigest()

    @property
    def image_bytes(self) -> int:
        """Bytes of all image files."""
        return int(self._table.image_bytes.sum())

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all images when they are decoded, three per pixel."""
        return int(self._table.pixel_bytes.sum())

    def labels(self) -> NDArray[np.int64]:
        """The labels of all samples (N,), -1 for none; no image is read."""
        return np.concatenate([read_rows(self._shards.place, entry)[:, 2] for entry in self._table])

    def sizes(self, samples: ArrayLike | None = None) -> NDArray[np.int64]:
        """Height and width (N, 2) of the decoded images of some samples, or of all; no image is read.

        0 and 0 for one whose head says that it cannot be decoded. Damage behind the head is not known here.
        """
        if samples is None:
            return np.concatenate([read_rows(self._shards.place, entry)[:, SIZE] for entry in self._table])
        samples_N = np.asarray(samples, dtype=np.int64)
        shards_N = np.searchsorted(self._ends, samples_N, side="right")
        sizes_N2 = np.empty((len(samples_N), 2), dtype=np.int64)
        for shard in np.unique(shards_N).tolist():
            here_N = shards_N == shard
            first = int(self._ends[shard] - self.shard_counts[shard])
            sizes_N2[here_N] = self._shards.rows(shard)[samples_N[here_N] - first, SIZE]
        return sizes_N2

    def check_cache(self, block_shards: int) -> None:
        """Raise DataError if the shards are remote and a block of them does not fit into the cache."""
        block, remote = int(np.sort(self._table.bytes)[-block_shards:].sum()), self._shards.remote
        if remote is not None and block > remote.cache_bytes:
            raise DataError(
                f"A block of data.block_shards={block_shards} shards of '{self.source}' takes up to {block / 1e9:.3g} "
                f"GB, more than data.cache_gb={remote.cache_bytes / 1e9:g}. Raise it, or take smaller blocks."
            )

    def _row(self, sample: int) -> tuple[int, list[int]]:
        """The shard of a sample, and its row there."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample must lie in [0, {len(self)}). Got {sample}.")
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        first = int(self._ends[shard] - self.shard_counts[shard])
        return shard, self._shards.rows(shard)[sample - first].tolist()


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
