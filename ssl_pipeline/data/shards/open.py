"""WebDataset shards (plain tar files, https://github.com/webdataset/webdataset) read by sample number."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.catalogue import Catalogue, find_index, read_rows
from ssl_pipeline.data.shards.listing import ShardSource, list_shards
from ssl_pipeline.data.shards.opened import OpenShards
from ssl_pipeline.data.shards.origins import display_name, origin_of, packed_from
from ssl_pipeline.data.shards.overlay import NO_OVERLAY, Labels, Overlay, is_labelled
from ssl_pipeline.data.shards.remote import RemoteShards, is_url, open_remote
from ssl_pipeline.data.shards.rows import INVALID_LABEL, NO_LABEL, SIZE, pixel_bytes
from ssl_pipeline.data.shards.verification import verified_catalogue
from ssl_pipeline.files import sha256_of_bytes

FEW_PASSED_OVER = 10  # samples, whatever share of a small set they are

logger = logging.getLogger(__name__)

__all__ = ["DataError", "RawSample", "ShardIndex", "open_shards"]


@dataclass(frozen=True)
class RawSample:
    """The stored bytes of one image; its key is read from the tar header only when somebody asks.

    `label` is None without one; soft labels are a row (C,) float32.
    """

    image: bytes
    label: int | NDArray[np.float32] | None
    shard: str
    byte: int
    index: ShardIndex
    sample: int

    @property
    def key(self) -> str:
        return self.index.key(self.sample)

    @property
    def location(self) -> str:
        file, images = self.index.origin(self.sample), packed_from(self.index.folder)
        if file is not None and images is not None:
            return f"'{file}' of {images}"
        return f"{self.shard}, key '{self.key}', byte {self.byte}" + ("" if file is None else f", from '{file}'")


class ShardIndex:
    """Samples 0 to N-1 of a set of shards, in the order of the file names and then of the files.

    With an overlay (data/subset.py) there are only the images that it keeps, renumbered from 0, with its labels.
    Cheap to copy into a worker: shards and index files are opened where they are first read.
    """

    def __init__(
        self,
        folder: Path,
        place: Path,
        catalogue: Catalogue,
        remote: RemoteShards | None = None,
        overlay: Overlay = NO_OVERLAY,
        image_key: str | None = None,
    ) -> None:
        self.folder = folder
        self.source = str(folder) if remote is None else remote.url
        self.catalogue = catalogue
        self.overlay = overlay
        self.image_key = image_key
        self.class_names = catalogue.class_names if overlay.labels_file is None else overlay.class_names
        self._table = catalogue.table
        self._shards = OpenShards(folder, place, catalogue.table, remote)
        self._ends = np.cumsum(self._table.samples)

    @property
    def called(self) -> str:
        """What errors call these images: the folder or zip that a command packed for itself, or the shards' folder."""
        return display_name(self.source)

    def overlaid(self, overlay: Overlay) -> ShardIndex:
        """The same shards under another overlay."""
        place, remote = self._shards.place, self._shards.remote
        return ShardIndex(self.folder, place, self.catalogue, remote, overlay, self.image_key)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.overlay.keep is None else len(self.overlay.keep)

    def in_whole_set(self, samples: ArrayLike | None = None) -> NDArray[np.int64]:
        """The numbers of some samples (N,), or of all, in the set without an overlay."""
        samples_N = np.arange(len(self)) if samples is None else np.asarray(samples, dtype=np.int64)
        return samples_N if self.overlay.keep is None else self.overlay.keep[samples_N]

    def read(self, sample: int) -> RawSample:
        """The image bytes and the label of sample 0 <= sample < N."""
        shard, number, (offset, size, label, *_) = self._row(sample)
        image = self._shards.read(shard, offset, size)
        if self.overlay.labels is not None:
            own = self.overlay.labels[number]
            label = own if own.ndim else int(own)
        absent = isinstance(label, int) and label < 0
        return RawSample(image, None if absent else label, self._table.name[shard], offset, self, sample)

    def key(self, sample: int) -> str:
        """The key of a sample, read from its tar header."""
        shard, _, row = self._row(sample)
        return self._shards.key(shard, row[3])

    def origin(self, sample: int) -> str | None:
        """The file that a sample was made from, as `files.jsonl` next to the shards says; None without one."""
        return origin_of(self.folder, self.key(sample))

    @property
    def checksums(self) -> list[str]:
        """SHA-256 of each shard, the choice of images in them, and SHA-256 of the files of the overlay."""
        chosen = [] if self.image_key is None else [f"image_key {self.image_key}"]
        return [*self._table.sha256, *chosen, *self.overlay.checksums]

    @property
    def fingerprint(self) -> str:
        """One SHA-256 for the whole set: it differs for other images, labels, encoding, shards or overlays."""
        return sha256_of_bytes("".join(self.checksums).encode())

    @cached_property
    def shard_counts(self) -> NDArray[np.int64]:
        """Samples of each shard."""
        if self.overlay.keep is None:
            return self._table.samples
        return np.diff(np.searchsorted(self.overlay.keep, self._ends), prepend=0)

    @cached_property
    def shard_pixel_bytes(self) -> NDArray[np.int64]:
        """Bytes of the images of each shard when they are decoded, three per pixel."""
        if self.overlay.keep is None:
            return self._table.pixel_bytes
        ends = np.concatenate(([0], pixel_bytes(self.sizes()).cumsum()))[np.cumsum(self.shard_counts)]
        return np.diff(ends, prepend=0)

    @property
    def image_bytes(self) -> int:
        """Bytes of all image files."""
        return int(self._table.image_bytes.sum() if self.overlay.keep is None else self.lengths().sum())

    def lengths(self) -> NDArray[np.int64]:
        """Bytes of each image file (N,); no image is read."""
        return self._columns(1)

    def excerpt(self, sample: int, length: int) -> bytes:
        """`length` bytes from the middle of an image file and as many from its end, or the whole of a small one."""
        shard, _, (offset, size, *_) = self._row(sample)
        if size <= 2 * length:
            return self._shards.read(shard, offset, size)
        middle = self._shards.read(shard, offset + (size - length) // 2, length)
        return middle + self._shards.read(shard, offset + size - length, length)

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched before they are read."""
        return self._shards.remote is not None

    @property
    def widest(self) -> int:
        """Pixels of the longest row of an image, of the whole set."""
        return int(self._table.widest.max())

    @cached_property
    def has_labels(self) -> bool:
        """Whether all samples have a label."""
        if self.overlay.labels is None and (self._table.labelled == self._table.samples).all():
            return True
        return bool(is_labelled(self.labels()).all())

    def label_problem(self) -> str | None:
        """How many images have no label, and the first of them by shard and key; None if all have one."""
        unlabelled = np.flatnonzero(~is_labelled(self.labels()))
        if not len(unlabelled):
            return None
        first = int(unlabelled[0])
        shard, _, row = self._row(first)
        invalid = self.overlay.labels is None and row[2] == INVALID_LABEL
        what = "a label that is not a 64-bit integer" if invalid else "no label"
        place = f"shard '{self._table.name[shard]}', key '{self.key(first)}'"
        if packed_from(self.folder) is not None:
            place = f"'{self.origin(first)}'"
        return f"{len(unlabelled):,} of {len(self):,} images have no usable label; the first, {place}, has {what}"

    @property
    def num_soft_classes(self) -> int | None:
        """The C of soft labels (N, C); None where a label is one class."""
        labels = self.overlay.labels
        return None if labels is None or labels.ndim == 1 else labels.shape[1]

    def labels(self) -> Labels:
        """The labels of all samples, (N,) int64 with -1 for none, or soft ones (N, C) float32; no image is read."""
        if self.overlay.labels is None:
            return np.maximum(self._columns(2), NO_LABEL)
        return self.overlay.labels if self.overlay.keep is None else self.overlay.labels[self.overlay.keep]

    def sizes(self, samples: ArrayLike | None = None) -> NDArray[np.int64]:
        """Height and width (N, 2) of the decoded images of some samples, or of all; no image is read.

        0 and 0 for one whose header says that it cannot be decoded. Damage after the header is not known here.
        """
        if samples is None:
            return self._columns(SIZE)
        samples_N = self.in_whole_set(samples)
        shards_N = np.searchsorted(self._ends, samples_N, side="right")
        sizes_N2 = np.empty((len(samples_N), 2), dtype=np.int64)
        for shard in np.unique(shards_N).tolist():
            here_N = shards_N == shard
            sizes_N2[here_N] = self._shards.rows(shard)[samples_N[here_N] - self._first(shard), SIZE]
        return sizes_N2

    def check_cache(self, block_shards: int) -> None:
        """Raise DataError if the shards are remote and a block of them does not fit into the cache."""
        block, remote = int(np.sort(self._table.bytes)[-block_shards:].sum()), self._shards.remote
        if remote is not None and block > remote.cache_bytes:
            raise DataError(
                f"A block of data.block_shards={block_shards} shards of '{self.source}' takes up to {block / 1e9:.3g} "
                f"GB, more than data.cache_gb={remote.cache_bytes / 1e9:g}. Raise it, or take smaller blocks."
            )

    def _columns(self, columns: int | slice) -> NDArray[np.int64]:
        """Some columns of the rows of all samples."""
        parts = [read_rows(self._shards.place, entry)[:, columns] for entry in self._table]
        found_N = np.concatenate(parts)
        return found_N if self.overlay.keep is None else found_N[self.overlay.keep]

    def _first(self, shard: int) -> int:
        """The number in the whole set of a shard's first sample."""
        return int(self._ends[shard] - self._table.samples[shard])

    def _row(self, sample: int) -> tuple[int, int, list[int]]:
        """The shard of a sample, its number in the whole set, and its row."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample must lie in [0, {len(self)}). Got {sample}.")
        number = sample if self.overlay.keep is None else int(self.overlay.keep[sample])
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number, self._shards.rows(shard)[number - self._first(shard)].tolist()


def open_shards(
    source: ShardSource,
    *,
    cache_dir: Path | None = None,
    cache_gb: float = 50.0,
    image_key: str | None = None,
    budget: float = 0.01,
) -> ShardIndex:
    """The shards of a directory, of a pattern such as `DIR/train-*.tar`, or of a URL such as `s3://bucket/train`.

    Files, braces and lists are read too (`list_shards`). Where there is no index, one is made (in `DIR/.index`, or in
    the user's cache if DIR is read-only). Where there is one, every shard is checked against it: a shard that was
    changed, added or removed is a DataError. Safe to call from several processes at once: the first makes the index,
    the others wait for it. Shards of a URL are fetched as they are read, into `cache_dir` (by default in the user's
    cache), of which at most `cache_gb` are kept.

    `image_key` chooses the image by its extension where samples have several, such as `input.jpg`. Samples without an
    image, or with several, are skipped, up to FEW_PASSED_OVER or a share of `budget`: more are a DataError.
    """
    urls = [place for place in ([source] if isinstance(source, str | Path) else source) if is_url(place)]
    if urls and (isinstance(source, Path) or source not in (urls[0], [urls[0]], (urls[0],))):
        raise DataError(f"'{urls[0]}' must be the only entry: a list of shards can hold only local files.")
    if urls:
        remote = open_remote(str(urls[0]), cache_dir=cache_dir, cache_gb=cache_gb, image_key=image_key)
        index = ShardIndex(remote.place, remote.place, remote.catalogue(), remote, image_key=image_key)
    else:
        listed = list_shards(source)
        place = find_index(listed, image_key)
        try:
            catalogue = verified_catalogue(listed, place, image_key=image_key)
        except DataError as error:
            images = packed_from(listed.folder)
            if images is None:
                raise
            again = f"Delete the folder '{listed.folder}' and run the same command again: {images} is packed again."
            told = str(error).partition(". ")[0]  # without the advice for shards made by others
            raise DataError(f"What was packed from {images} is damaged: {told}. {again}") from None
        index = ShardIndex(listed.folder, place, catalogue, image_key=image_key)
    _check_passed_over(index, budget)
    return index


def _check_passed_over(index: ShardIndex, budget: float) -> None:
    """Say what is passed over; DataError if that is more than the budget allows."""
    table = index.catalogue.table
    passed_over, others, samples = (
        int(column.sum()) for column in (table.passed_over, table.other_files, table.samples)
    )
    if not passed_over and not others:
        return
    example = table.example[int(table.passed_over.argmax())] if passed_over else ""
    allowed = max(FEW_PASSED_OVER, int(budget * (samples + passed_over))) if budget > 0 else 0
    if passed_over > min(allowed, samples):
        raise DataError(
            f"{passed_over:,} of {samples + passed_over:,} samples of '{index.called}' cannot be used, more than "
            f"data.bad_sample_budget={budget:g} allows. {example}"
        )
    logger.warning(
        "%s: passed over %d of %d samples and %d files that belong to no sample.%s",
        index.called,
        passed_over,
        samples + passed_over,
        others,
        f" {example}" if example else "",
    )
