"""Changes on top of a set of shards that leave them untouched: which images there are, and which labels they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.data.errors import DataError

ROWS_CHECKED = 65_536  # soft labels at a time
OF_ONE = 0.01  # what a row of soft labels may be off, rounded to few digits

Labels = NDArray[np.int64] | NDArray[np.float32]  # (N,), -1 = none; or soft ones (N, C), a row of zeros = none


@dataclass(frozen=True)
class Overlay:
    """Files that were verified, mapped where they are first read; cheap to copy into a worker.

    keep_file: int64 (K,), the numbers in the whole set of the images that stay, ascending. labels_file: labels of the
    whole set; `class_names` are theirs. checksums: identify this overlay.
    """

    keep_file: Path | None = None
    labels_file: Path | None = None
    class_names: tuple[str, ...] | None = None
    checksums: Sequence[str] = ()

    @cached_property
    def keep(self) -> NDArray[np.int64] | None:
        return None if self.keep_file is None else _mapped(self.keep_file)

    @cached_property
    def labels(self) -> Labels | None:
        return None if self.labels_file is None else _mapped(self.labels_file)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("keep", "labels")}


NO_OVERLAY = Overlay()


def _mapped(path: Path) -> NDArray:
    """A plain array on the mapping of an .npy file; those of numpy's own class take twice as long to index."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def is_labelled(labels: Labels) -> NDArray[np.bool_]:
    """Whether each image has a label (N,)."""
    return np.asarray(labels >= 0 if labels.ndim == 1 else labels.any(axis=1))


def check_keep(numbers: NDArray, num_images: int, *, where: str) -> None:
    """Raise DataError unless these are numbers of images of the whole set, ascending, each once."""
    if numbers.dtype != np.int64 or numbers.ndim != 1:
        raise DataError(
            f"{where} must hold int64 (K,), the numbers of the images to keep. Got {numbers.dtype} {numbers.shape}."
        )
    if not len(numbers):
        raise DataError(f"{where} keeps no image.")
    wrong = np.flatnonzero(np.diff(numbers) <= 0)
    if len(wrong):
        first, second = numbers[wrong[0] : wrong[0] + 2].tolist()
        raise DataError(f"{where} must be ascending, each number once. Got {first} before {second} at {wrong[0]}.")
    for number in (int(numbers[0]), int(numbers[-1])):
        if not 0 <= number < num_images:
            raise DataError(f"{where} keeps image {number}; the shards have {num_images}, from 0 to {num_images - 1}.")


def check_labels(labels: NDArray, num_images: int, class_names: Sequence[str] | None, *, where: str) -> None:
    """Raise DataError unless these are labels of the whole set, within the named classes if there are names."""
    is_soft = labels.dtype == np.float32 and labels.ndim == 2
    if not is_soft and (labels.dtype != np.int64 or labels.ndim != 1):
        raise DataError(
            f"{where} must hold int64 (N,), one class each, or soft labels float32 (N, C). "
            f"Got {labels.dtype} {labels.shape}."
        )
    if len(labels) != num_images:
        raise DataError(
            f"{where} must have a label for each of the {num_images} images of the shards, including those that keep "
            f"leaves out. Got {len(labels)}."
        )
    if is_soft:
        _check_soft(labels, class_names, where)
        return
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < -1:
        raise DataError(f"{where} must hold classes from 0 on, or -1 for none. Got {lowest}.")
    if class_names is not None and highest >= len(class_names):
        raise DataError(
            f"{where} has label {highest} for image {int(labels.argmax())}, but names only {len(class_names)} classes."
        )


def _check_soft(labels: NDArray[np.float32], class_names: Sequence[str] | None, where: str) -> None:
    if class_names is not None and labels.shape[1] != len(class_names):
        raise DataError(f"{where} has soft labels of {labels.shape[1]} classes, but names {len(class_names)}.")
    for start in range(0, len(labels), ROWS_CHECKED):
        rows = labels[start : start + ROWS_CHECKED]
        wrong = np.argwhere(~(np.isfinite(rows) & (rows >= 0)))
        if len(wrong):
            row, column = wrong[0]
            raise DataError(
                f"{where} must hold finite soft labels that are not negative. Got {rows[row, column]} for image "
                f"{start + row}."
            )
        sums = rows.sum(axis=1, dtype=np.float64)
        unequal = np.flatnonzero((np.abs(sums - 1) > OF_ONE) & (sums != 0))
        if len(unequal):
            row = unequal[0]
            raise DataError(
                f"{where} must hold soft labels that sum to 1, or all 0 for an image without one. Got a sum of "
                f"{sums[row]:g} for image {start + row}. Divide each row by its sum."
            )
