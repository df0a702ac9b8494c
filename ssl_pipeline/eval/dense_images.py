"""Images with a mask each, from a folder or a zip: what they are called, their bytes, the classes of their pixels."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import Path as ZipPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.decode import decoded_size
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.headers import image_extension
from ssl_pipeline.files import sha256_of_bytes

MASK_MODES = ("L", "P", "1", "I", "I;16")  # of Pillow: one number per pixel
CLASS_NAMES = "classes.txt"

Mask = NDArray[np.int64]


@dataclass(frozen=True)
class DenseImage:
    """The bytes of an image and where it lies."""

    image: bytes
    location: str
    label: None = None


class DenseImages:
    """Some images of a source and their masks, by number: the feature pass reads the images, the masks are the truth.

    pairs: file of each image and of its mask, below the source.
    """

    num_soft_classes: None = None

    def __init__(self, source: str, pairs: Sequence[tuple[str, str]]) -> None:
        self.source = source
        self.pairs = tuple(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def checksums(self) -> list[str]:
        """SHA-256 of each image."""
        return [sha256_of_bytes(_bytes(self.source, image)) for image, _ in self.pairs]

    @property
    def fingerprint(self) -> str:
        """One SHA-256 for all images and masks."""
        masks = [sha256_of_bytes(_bytes(self.source, mask)) for _, mask in self.pairs]
        return sha256_of_bytes("".join([*self.checksums, *masks]).encode())

    def read(self, sample: int) -> DenseImage:
        name, _ = self.pairs[sample]
        return DenseImage(_bytes(self.source, name), f"'{name}' of {self.source}")

    def mask(self, sample: int) -> Mask:
        """The number of each pixel (H, W); DataError if it is not a mask, or its size differs from its image's."""
        name, mask_name = self.pairs[sample]
        pixels = _read_mask(_bytes(self.source, mask_name), f"'{mask_name}' of {self.source}")
        height, width = decoded_size(_bytes(self.source, name))
        if pixels.shape != (height, width):
            raise DataError(
                f"A mask must have the size of its image. '{mask_name}' of {self.source} has "
                f"{pixels.shape[1]}x{pixels.shape[0]} pixels, '{name}' has {width}x{height}."
            )
        return pixels


def open_dense(source: str, images: str, masks: str, split: str) -> DenseImages:
    """The images of one split with their masks; ConfigError if there are none, or if one has no mask.

    split: a file of the source that lists names, one a line; or a folder in both `images` and `masks`.
    """
    root = _root(source, os.getpid())
    if root is None:
        raise ConfigError(f"source={source} must be a folder or a zip. There is none.")
    if split.endswith(".txt"):
        folders, wanted = (images, masks), _listed(root, source, split)
    else:
        folders, wanted = (f"{images}/{split}", f"{masks}/{split}"), None
    found, found_masks = (_files(root, source, folder) for folder in folders)
    if not found_masks:
        raise ConfigError(f"{source} has no masks: its folder '{folders[1]}' is empty. Put a PNG there for each image.")
    names = sorted(found) if wanted is None else wanted
    for name in names:
        for files, folder, kind in ((found, folders[0], "image"), (found_masks, folders[1], "mask")):
            if name not in files:
                missing = sum(other not in files for other in names)
                raise ConfigError(f"{source} has no {kind} '{folder}/{name}'; {missing} of {len(names)} are missing.")
    if not names:
        raise ConfigError(f"{source} has no images in '{split}'.")
    return DenseImages(source, [(found[name], found_masks[name]) for name in names])


def class_names(source: str) -> tuple[str, ...]:
    """The lines of classes.txt, the name of class 0 first; nothing without such a file."""
    root = _root(source, os.getpid())
    file = None if root is None else root / CLASS_NAMES
    if file is None or not file.is_file():
        return ()
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


@lru_cache(maxsize=4)
def _root(source: str, process: int) -> Path | ZipPath | None:
    """Where the files are, opened by each process for itself: two must not share the position in a zip."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    return ZipPath(path) if path.is_file() and path.suffix == ".zip" else None


def _bytes(source: str, name: str) -> bytes:
    root = _root(source, os.getpid())
    assert root is not None
    return (root / name).read_bytes()


def _listed(root: Path | ZipPath, source: str, split: str) -> list[str]:
    """The names in a list, without folders and endings."""
    file = root / split
    if not file.is_file():
        raise ConfigError(f"{source} has no file '{split}' that lists the images of a split.")
    lines = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Path(line).stem for line in lines]


def _files(root: Path | ZipPath, source: str, folder: str) -> dict[str, str]:
    """The files of a folder by their names without ending."""
    place = root / folder
    if not place.is_dir():
        raise ConfigError(f"{source} has no folder '{folder}'. Name the folders by images=, masks= and the splits.")
    names = [entry.name for entry in place.iterdir() if entry.is_file() and not entry.name.startswith(".")]
    return {Path(name).stem: f"{folder}/{name}" for name in names}


def _read_mask(data: bytes, location: str) -> Mask:
    if image_extension(data) is None:
        raise DataError(f"{location} is not a PNG, JPEG or WebP image, which a mask must be.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # damaged files make Pillow raise a dozen types
        raise DataError(f"Cannot decode {location}: {error}.") from None
    if mode not in MASK_MODES or pixels.ndim != 2:
        raise DataError(
            f"A mask must have one number per pixel, its class. {location} has pixels of Pillow's mode {mode}."
        )
    return pixels.astype(np.int64)
