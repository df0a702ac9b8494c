"""Where make_shards takes images from: a folder, a zip, or scikit-learn's digits. Nothing is ever unpacked to disk."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from PIL import Image

from ssl_pipeline.config import nearest
from ssl_pipeline.data.shards.open import DataError

MAX_FILE_BYTES = 256 << 20  # a larger file is no image of at most 50 megapixels, and may be a zip bomb


class UnreadableFileError(Exception):
    """One file that cannot be read; the others can."""


class Source(Protocol):
    """Files by name ("folder/file", sorted) and their bytes; picklable, so that every process reads for itself."""

    def names(self) -> list[str]: ...
    def folders(self) -> set[str]: ...
    def read(self, name: str) -> bytes: ...


def open_source(source: str, prefix: str, split: str | None) -> Source:
    """The source that `source=` names; DataError if there is none."""
    if source != "digits" and split is not None:
        raise DataError(f"split={split} goes with source=digits only. Choose a part of '{source}' by prefix=.")
    if source == "digits":
        if prefix:
            raise DataError(f"source=digits has no folders. Choose split=train or split=test, not prefix={prefix}.")
        return DigitsSource(split or "train")
    path = Path(source)
    found: Source
    if path.is_dir():
        found = FolderSource(path)
    elif path.is_file() and zipfile.is_zipfile(path):
        found = ZipSource(path)
    else:
        what = "is neither a folder nor a zip" if path.exists() else "does not exist"
        raise DataError(f"source='{source}' {what}. Needed: a folder of images, a zip of one, or the word digits.")
    return PartOfSource(found, prefix) if prefix.strip("/") else found


class FolderSource:
    """The files below a folder, links followed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        return sorted(name for _, files in self._walk() for name in files)

    def folders(self) -> set[str]:
        return {folder for folder, _ in self._walk()}

    def read(self, name: str) -> bytes:
        path = self.root / name
        try:
            if not path.is_file():
                raise UnreadableFileError("no regular file")
            if path.stat().st_size > MAX_FILE_BYTES:
                raise UnreadableFileError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
            return path.read_bytes()
        except OSError as error:
            raise UnreadableFileError(error.strerror or str(error)) from None

    def _walk(self) -> Iterator[tuple[str, list[str]]]:
        """Folders, relative and "" for the root, with the names of their files; a link back up is not followed."""
        seen = set()
        for folder, subfolders, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            relative = Path(folder).relative_to(self.root).as_posix()
            start = "" if relative == "." else f"{relative}/"
            yield start.rstrip("/"), [start + file for file in files]


class ZipSource:
    """The files in a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def archive(self) -> zipfile.ZipFile:
        return _opened_zip(self.path, os.getpid())

    def names(self) -> list[str]:
        return sorted({entry.filename for entry in self.archive.infolist() if not entry.is_dir()})

    def folders(self) -> set[str]:
        return {entry.filename.rstrip("/") for entry in self.archive.infolist() if entry.is_dir()}

    def read(self, name: str) -> bytes:
        try:
            with self.archive.open(name) as file:
                data = file.read(MAX_FILE_BYTES + 1)  # whatever size the archive claims
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError, zlib.error) as error:
            raise UnreadableFileError(" ".join(str(error).split())) from None
        if len(data) > MAX_FILE_BYTES:
            raise UnreadableFileError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        return data


class PartOfSource:
    """The files of a source below one of its folders, named from there on."""

    def __init__(self, source: Source, prefix: str) -> None:
        self.source = source
        self.prefix = prefix.strip("/") + "/"

    def names(self) -> list[str]:
        everything = self.source.names()
        names = [name.removeprefix(self.prefix) for name in everything if name.startswith(self.prefix)]
        if not names:
            tops = sorted({name.split("/")[0] for name in everything if "/" in name})
            known = ", ".join(tops[:10]) + (", ..." if len(tops) > 10 else "")
            hint = nearest(self.prefix.rstrip("/"), tops)
            raise DataError(f"There is nothing below prefix={self.prefix}.{hint} Top folders: {known or 'none'}")
        return names

    def folders(self) -> set[str]:
        return {name.removeprefix(self.prefix) for name in self.source.folders() if name.startswith(self.prefix)}

    def read(self, name: str) -> bytes:
        return self.source.read(self.prefix + name)


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak, 1998) as 8x8 PNG files; 80 % are for training."""

    def __init__(self, split: str) -> None:
        self.split = split

    def names(self) -> list[str]:
        return sorted(_digit_files(self.split))

    def folders(self) -> set[str]:
        return {str(digit) for digit in range(10)}

    def read(self, name: str) -> bytes:
        return _digit_files(self.split)[name]


@lru_cache(maxsize=1)
def _opened_zip(path: Path, process: int) -> zipfile.ZipFile:
    """The archive, opened once in each process: processes that share a file would move each other's position."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"'{path}' is damaged: {error}.") from None


@lru_cache(maxsize=1)
def _digit_files(split: str) -> dict[str, bytes]:
    """PNG files by name; a fifth of each class is the test split, the same one everywhere."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    numbers: Sequence[int] = parts[0 if split == "train" else 1]
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    files = {}
    for number in numbers:
        file = io.BytesIO()
        Image.fromarray(pixels[number]).save(file, format="PNG")
        files[f"{digits.target[number]}/{number:04d}.png"] = file.getvalue()
    return files
