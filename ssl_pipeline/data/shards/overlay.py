"""What is laid over a set of shards without touching them: which images there are, and which labels they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64] | NDArray[np.float32]  # (N,), -1 = none; or soft ones (N, C), a row of zeros = none


@dataclass(frozen=True)
class Overlay:
    """Files that were verified, mapped where they are first read; cheap to copy into a worker.

    keep_file: int64 (K,), the numbers in the whole set of the images that stay, ascending. labels_file: labels of the
    whole set; `class_names` are theirs. checksums: what tells this overlay from others.
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
