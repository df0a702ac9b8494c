"""Where each image of one shard lies: found once, by walking the headers of its tar file."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.data.decode import decoded_size
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.tar import Member, TarBytes, walk
from ssl_pipeline.files import sha256_of

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
LABEL_KEYS = ("label", "cls")  # of a .json member
NO_LABEL = -1
COLUMNS = 6
SIZE = slice(4, 6)  # the columns of height and width
MAX_LABEL_BYTES = 1 << 24


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was when it was indexed.

    image_bytes: of its image files. pixel_bytes: of the images when they are decoded, three per pixel. widest: pixels
    of its longest row.
    """

    name: str
    bytes: int
    modified_ns: int
    sha256: str
    samples: int
    labelled: int
    image_bytes: int
    pixel_bytes: int
    widest: int


def index_shard(path: Path, name: str | None = None) -> tuple[ShardEntry, NDArray[np.int64]]:
    """Verify the structure of one shard from end to end and find its samples.

    Rows are int64 (samples, 6): image offset, image size, label or -1, the byte of the header from which the key can
    be read again, and height and width of the decoded image, 0 and 0 if its head says that it will be refused. `name`
    is the shard's own if the file has another. Raises DataError naming the shard and the byte or key.
    """
    name = name or path.name
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size == 0:
            raise DataError(f"Shard '{name}' is empty (0 bytes). Copy it again or make it again.")
        sha256 = sha256_of(file)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            rows = list(_samples(data, name))
    array = np.array(rows, dtype=np.int64).reshape(-1, COLUMNS)
    entry = ShardEntry(
        name=name,
        bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        sha256=sha256,
        samples=len(array),
        labelled=int((array[:, 2] != NO_LABEL).sum()),
        image_bytes=int(array[:, 1].sum()),
        pixel_bytes=int(pixel_bytes(array[:, SIZE]).sum()),
        widest=int(array[:, SIZE.stop - 1].max(initial=0)),
    )
    return entry, array


def pixel_bytes(sizes_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of each decoded image (N,), from their heights and widths."""
    return 3 * sizes_N2[:, 0] * sizes_N2[:, 1]


def _samples(data: TarBytes, shard: str) -> Iterator[tuple[int, ...]]:
    """One row per sample: adjacent members of one key, in the order of the file."""
    seen = set()
    current, members = "", dict[str, Member]()
    for member in walk(data, shard=shard):
        key, extension = split_name(member.name)
        if not key:
            continue
        if key != current:
            if members:
                yield _row(data, shard, current, members)
            if key in seen:
                raise DataError(f"Shard '{shard}' has the key '{key}' twice, again at byte {member.start}.")
            seen.add(key)
            current, members = key, {}
        if extension in members:
            raise DataError(f"Shard '{shard}' has the member {member.name!r} twice, again at byte {member.start}.")
        members[extension] = member
    if members:
        yield _row(data, shard, current, members)


def key_at(data: TarBytes, start: int, *, shard: str) -> str:
    """The key of the member whose header begins at byte `start`."""
    return split_name(next(walk(data, shard=shard, start=start)).name)[0]


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by the WebDataset convention: the name is cut at the first dot of its last part.

    ("", "") for what is no part of a sample: no dot, a hidden file, or a `__meta__` member.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not (stem and dot and extension) or any(part.startswith("__") for part in name.split("/")):
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()


def _row(data: TarBytes, shard: str, key: str, members: dict[str, Member]) -> tuple[int, ...]:
    images = [member for extension, member in members.items() if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        start = min(member.start for member in members.values())
        found = ", ".join(f".{extension}" for extension in members)
        raise DataError(
            f"Shard '{shard}', key '{key}', byte {start}: a sample needs one image "
            f"({', '.join('.' + extension for extension in IMAGE_EXTENSIONS)}). It has {found}."
        )
    (image,) = images
    size = decoded_size(data, image.offset, image.offset + image.size)
    return image.offset, image.size, _label(data, shard, key, members), image.start, *size


def _label(data: TarBytes, shard: str, key: str, members: dict[str, Member]) -> int:
    """The `.cls` number, or the integer `label` or `cls` of a `.json` object; -1 without either."""
    for extension in LABEL_EXTENSIONS:
        member = members.get(extension)
        if member is None:
            continue
        try:
            if member.size > MAX_LABEL_BYTES:
                raise ValueError
            text = data[member.offset : member.offset + member.size].decode("utf-8")
            value = int(text) if extension == "cls" else _json_label(json.loads(text))
        except (ValueError, RecursionError):
            raise DataError(
                f"Shard '{shard}', key '{key}', byte {member.offset}: the .{extension} member holds no valid "
                f"{'integer' if extension == 'cls' else 'JSON'}."
            ) from None
        if value is not None:
            return value if 0 <= value < 2**63 else NO_LABEL
    return NO_LABEL


def _json_label(value: object) -> int | None:
    if isinstance(value, dict):
        for name in LABEL_KEYS:
            if isinstance(value.get(name), int) and not isinstance(value[name], bool):
                return value[name]
    return None
