"""Features on disk, memory-mapped: a folder of numpy files for each (weights, images, protocol).

`FINGERPRINT/pooled.npy` and so on, a row per image, `labels.npy`, and `pass.json`: what the features depend on and the
SHA-256 of each file. It is written last, and the folder gets its name when all is there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ssl_pipeline.files import sha256_of, sha256_of_json, write_json

ABOUT = "pass.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFeatures:
    """Memory-mapped features (N, ...) by their kind, and labels (N,) int64 with -1 for none."""

    features: dict[str, Tensor]
    labels: Tensor


def place_of(directory: Path, identity: Mapping[str, object]) -> Path:
    """The folder of the features that depend on `identity`, which is everything that they depend on, as JSON."""
    return directory / sha256_of_json(identity)[:32]


def read_stored(place: Path) -> StoredFeatures | None:
    """The features in `place`; None if there are none, or damaged or other ones, which are removed with a warning."""
    if not place.exists():
        return None
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        for name, expected in about["sha256"].items():
            if sha256_of(place / f"{name}.npy") != expected:
                raise ValueError(f"the checksum of {name}.npy differs")
        if place_of(place.parent, about["identity"]) == place:
            return map_stored(place)
        fault = f"holds features of another network, other images or other settings, as its {ABOUT} says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fault = f"is damaged ({error})"
    logger.warning("%s %s: its features are computed again", place, fault)
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    return None


def map_stored(place: Path) -> StoredFeatures:
    """The features in `place`, whose checksums were already compared; writing to them changes no file."""
    arrays = {
        path.stem: torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)) for path in place.glob("*.npy")
    }
    labels = arrays.pop("labels")
    return StoredFeatures(arrays, labels)


@contextmanager
def stored_whole(place: Path, identity: Mapping[str, object], *, aside: Path) -> Iterator[None]:
    """The folder `aside` to write numpy files into, which becomes `place` at the end; on failure nothing is left."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield
        store(aside, place, identity)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def store(aside: Path, place: Path, identity: Mapping[str, object]) -> None:
    """Make the numpy files in `aside`, which are complete, the features of `place`."""
    sha256 = {path.stem: sha256_of(path) for path in sorted(aside.glob("*.npy"))}
    write_json(aside / ABOUT, {"sha256": sha256, "identity": json.loads(json.dumps(identity))}, durable=False)
    if not place.exists():  # or another command finished first, with the same features
        aside.rename(place)


class RowsFile:
    """An .npy file of a known shape whose rows are written by several processes, each its own.

    By plain writes and not through a map: a full disk is then an error, where a map would end the process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        header, self.dtype = BytesIO(), np.dtype(dtype)
        np.lib.format.write_array_header_1_0(
            header, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        )
        self.path = path
        self._header = header.getvalue()
        self._row_bytes = self.dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        self._bytes = len(self._header) + shape[0] * self._row_bytes
        self._file: BinaryIO | None = None

    def create(self) -> None:
        """Make the file, with all the disk space that it needs; OSError if there is too little."""
        with self.path.open("wb") as file:
            file.write(self._header)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self._bytes)

    def write(self, rows: NDArray, *, first: int) -> None:
        """Some rows, from number `first` on."""
        if self._file is None:
            self._file = self.path.open("r+b")
        self._file.seek(len(self._header) + first * self._row_bytes)
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
