"""Where make_shards takes images from: a folder, a zip, one image, or scikit-learn's digits.

Nothing is ever unpacked to disk.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from PIL import Image

from ssl_pipeline.config import nearest
from ssl_pipeline.data.shards.open import DataError
from ssl_pipeline.packing.conversion import is_image_name

MAX_FILE_BYTES = 256 << 20  # a larger file is not an image of at most 50 megapixels, and may be a zip bomb
UTF8_FLAG = 0x800
DIGITS = "digits"
NEEDED = "a folder of images, a zip of one, an image, or the word digits"


class UnreadableFileError(Exception):
    """One file that cannot be read; the others can."""


@dataclass(frozen=True)
class Rejected:
    """A file that is left out."""

    file: str
    reason: str


class Readable(Protocol):
    """Files that are read by their name; picklable, so that every process reads for itself."""

    def read(self, name: str) -> bytes: ...


class Source(Readable, Protocol):
    """Files by name ("folder/file", sorted) and their bytes.

    `left_out` has what is there and has no name of its own: folders that cannot be listed, files under a later one.
    `size`: bytes of a file, as the file system or the zip says; -1 for one that is not there any more.
    """

    def names(self) -> list[str]: ...
    def size(self, name: str) -> int: ...
    def folders(self) -> set[str]: ...
    def left_out(self) -> list[Rejected]: ...


def open_source(
    source: str, prefix: str = "", split: str | None = None, *, key: str = "source", needed: str = NEEDED
) -> Source:
    """The source that the setting `key` names; DataError if there is none, which says what is needed."""
    if source != DIGITS and split is not None:
        raise DataError(f"split={split} goes with source=digits only. Choose a part of '{source}' by prefix=.")
    if source == DIGITS:
        if prefix:
            raise DataError(f"source=digits has no folders. Choose split=train or split=test, not prefix={prefix}.")
        return DigitsSource(split or "train")
    path = Path(source)
    found: Source
    if path.is_dir():
        found = FolderSource(path)
    elif path.is_file() and zipfile.is_zipfile(path):
        found = ZipSource(path)
    elif path.is_file() and is_image_name(path.name):
        found = SingleImage(path)
    else:
        what = "is not a folder, a zip or an image" if path.exists() else "does not exist"
        raise DataError(f"{key}='{source}' {what}. Needed: {needed}.")
    return PartOfSource(found, prefix) if prefix.strip("/") else found


class FolderSource:
    """The files below a folder, links followed, as they are when they are first asked for: it is walked once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __getstate__(self) -> dict[str, object]:
        """What goes to other processes: they read files by name, and have no use for the list of all."""
        return {"root": self.root}

    def names(self) -> list[str]:
        return sorted(name for _, files in self._walked[0] for name in files)

    def size(self, name: str) -> int:
        try:
            return (self.root / name).stat().st_size
        except OSError:
            return -1

    def folders(self) -> set[str]:
        return {folder for folder, _ in self._walked[0]}

    def left_out(self) -> list[Rejected]:
        return list(self._walked[1])

    def read(self, name: str) -> bytes:
        return _read_file(self.root / name)

    @cached_property
    def _walked(self) -> tuple[list[tuple[str, list[str]]], list[Rejected]]:
        """Folders, relative and "" for the root, with the names of their files; a folder is walked once.

        Others are noted: links to a folder that was walked already, and what cannot be listed.
        """
        noted, found = list[Rejected](), list[tuple[str, list[str]]]()
        seen = set[str]()

        def unreadable(error: OSError) -> None:
            noted.append(Rejected(self._relative(error.filename), f"folder that cannot be listed: {error.strerror}"))

        for folder, subfolders, files in os.walk(self.root, followlinks=True, onerror=unreadable):
            subfolders.sort()
            real, relative = os.path.realpath(folder), self._relative(folder)
            if real in seen:
                subfolders.clear()
                noted.append(Rejected(relative, "the same folder as another"))
                continue
            seen.add(real)
            start = "" if relative == "." else f"{relative}/"
            found.append((start.rstrip("/"), [start + file for file in files]))
        return found, noted

    def _relative(self, folder: str) -> str:
        return Path(folder).relative_to(self.root).as_posix()


class SingleImage:
    """One image file, as a folder would hold it that has nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return [self.path.name]

    def size(self, name: str) -> int:
        return FolderSource(self.path.parent).size(name)

    def folders(self) -> set[str]:
        return set()

    def left_out(self) -> list[Rejected]:
        return []

    def read(self, name: str) -> bytes:
        return _read_file(self.path)


def _read_file(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise UnreadableFileError("not a regular file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnreadableFileError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableFileError(error.strerror or str(error)) from None


class ZipSource:
    """The files in a zip, whatever separates folders there: some Windows programs write backslashes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def files(self) -> dict[str, zipfile.ZipInfo]:
        return _opened_zip(self.path, os.getpid()).files

    def names(self) -> list[str]:
        return sorted(self.files)

    def size(self, name: str) -> int:
        return self.files[name].file_size

    def folders(self) -> set[str]:
        return _opened_zip(self.path, os.getpid()).folders

    def left_out(self) -> list[Rejected]:
        return _opened_zip(self.path, os.getpid()).replaced

    def read(self, name: str) -> bytes:
        archive = _opened_zip(self.path, os.getpid())
        try:
            with archive.file.open(archive.files[name]) as file:
                data = file.read(MAX_FILE_BYTES + 1)  # whatever size the archive claims
        except Exception as error:  # damage makes zipfile and its codecs raise a dozen types
            raise UnreadableFileError(" ".join(str(error).split())[:200] or type(error).__name__) from None
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

    def size(self, name: str) -> int:
        return self.source.size(self.prefix + name)

    def folders(self) -> set[str]:
        return {name.removeprefix(self.prefix) for name in self.source.folders() if name.startswith(self.prefix)}

    def left_out(self) -> list[Rejected]:
        found = self.source.left_out()
        return [
            Rejected(entry.file.removeprefix(self.prefix), entry.reason)
            for entry in found
            if entry.file.startswith(self.prefix)
        ]

    def read(self, name: str) -> bytes:
        return self.source.read(self.prefix + name)


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak, 1998) as 8x8 PNG files; 80 % are for training."""

    def __init__(self, split: str) -> None:
        self.split = split

    def names(self) -> list[str]:
        return sorted(_digit_files(self.split))

    def size(self, name: str) -> int:
        return len(_digit_files(self.split)[name])

    def folders(self) -> set[str]:
        return {str(digit) for digit in range(10)}

    def left_out(self) -> list[Rejected]:
        return []

    def read(self, name: str) -> bytes:
        return _digit_files(self.split)[name]


@dataclass(frozen=True)
class _OpenedZip:
    """An archive, its files by name, its folders, and files that a later one of the same name replaces."""

    file: zipfile.ZipFile
    files: dict[str, zipfile.ZipInfo]
    folders: set[str]
    replaced: list[Rejected]


@lru_cache(maxsize=1)
def _opened_zip(path: Path, process: int) -> _OpenedZip:
    """The archive, opened once in each process: processes that share a file would move each other's position."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise DataError(f"'{path}' cannot be read as a zip: {reason}. Pack it again, or unpack it.") from None
    opened = _OpenedZip(archive, {}, set(), [])
    for entry in archive.infolist():
        name = _zip_name(entry)
        if name.endswith("/"):
            opened.folders.add(name.rstrip("/"))
            continue
        if name in opened.files:
            opened.replaced.append(Rejected(name, "another file of the same name follows in the zip"))
        opened.files[name] = entry
    return opened


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """The name with `/` between folders, and in UTF-8 where the archive has that without saying so (macOS)."""
    name = entry.filename
    if not entry.flag_bits & UTF8_FLAG and not name.isascii():
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:  # it is what it says
            name = entry.filename
    return name.replace("\\", "/")


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
