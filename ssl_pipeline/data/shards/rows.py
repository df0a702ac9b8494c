"""Where each image of one shard lies: found once, by walking the headers of its tar file."""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from collections.abc import Sequence
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
NO_LABEL, INVALID_LABEL = -1, -2  # without one; with one that is not a 64-bit integer
COLUMNS = 6
SIZE = slice(4, 6)  # the columns of height and width
MAX_EXAMPLE, MAX_HINT = 300, 100  # letters
MAX_REASONS = 100  # why samples are passed over, counted apart
MAX_LABEL_BYTES = 1 << 24


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was when it was indexed.

    image_bytes: of its image files. pixel_bytes: of the images when they are decoded, three per pixel. widest: pixels
    of its longest row. passed_over: samples without an image, or with several. other_files: single files that belong to
    no sample, such as a README. example: what is wrong with most of what is passed over, by the first such sample; of a
    shard with only other files, what they are.
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
    passed_over: int = 0
    other_files: int = 0
    example: str = ""


class ShardRows:
    """What the members of one shard become: rows of samples, or skipped ones."""

    def __init__(self, data: TarBytes, shard: str, image_key: str | None) -> None:
        self.data = data
        self.shard = shard
        self.image_keys = None if image_key is None else image_key.lower().split(";")
        self.rows = list[tuple[int, ...]]()
        self.passed_over = self.other_files = 0
        self._reasons = dict[tuple[str, ...], tuple[int, str, str]]()  # how often, and the example in two parts
        self._others = Counter[str]()

    def read(self) -> None:
        """Adjacent members of one key are a sample, in the order of the file."""
        seen = set[str]()
        current, members = "", list[tuple[str, Member]]()
        for member in walk(self.data, shard=self.shard):
            key, extension = split_name(member.name)
            if not key:
                self._count_other(member.name)
                continue
            if key != current:
                self._add(current, members, seen)
                current, members = key, []
            members.append((extension, member))
        self._add(current, members, seen)

    def example(self) -> str:
        """What is wrong with most of the samples that are passed over, with their number; "" where nothing is."""
        if self._reasons:
            count, what, hint = max(self._reasons.values(), key=lambda reason: reason[0])
            more = f" {count - 1:,} more have the same problem." if count > 1 else ""
            return f"{what}{more}{hint}"
        if self.rows:
            return ""
        if not self._others:
            return f"Shard '{self.shard}' holds no file."
        held = ", ".join(f"{count:,} {extension}" for extension, count in self._others.most_common(5))
        return f"Shard '{self.shard}' holds no image ({_dotted(self.image_keys or IMAGE_EXTENSIONS)}), but {held}."

    def _add(self, key: str, members: list[tuple[str, Member]], seen: set[str]) -> None:
        if not members:
            return
        start, found = members[0][1].start, dict[str, Member]()
        for extension, member in members:
            found.setdefault(extension, member)
        images = self._images(found)
        if key in seen:
            self._pass_over(("key",), f"Shard '{self.shard}' has the key '{key}' twice, again at byte {start}.")
        elif len(found) != len(members):
            twice = next(member for number, (name, member) in enumerate(members) if name in dict(members[:number]))
            what = f"Shard '{self.shard}' has the member {twice.name!r} twice, again at byte {twice.start}."
            self._pass_over(("member",), what)
        elif (
            not images and len(members) == 1 and members[0][0] not in LABEL_EXTENSIONS and not _is_image(members[0][0])
        ):
            self.other_files += 1
            self._count_other(members[0][1].name)
        elif len(images) != 1:
            reason = ("extensions", *sorted(found))
            self._pass_over(reason, *self._what_is_wrong(key, start, found))
        else:
            (image,) = images
            size = decoded_size(self.data, image.offset, image.offset + image.size)
            label = _label(self.data, found)
            self.rows.append((image.offset, image.size, label, image.start, *size))
        seen.add(key)

    def _images(self, members: dict[str, Member]) -> list[Member]:
        if self.image_keys is None:
            return [member for extension, member in members.items() if extension in IMAGE_EXTENSIONS]
        return [members[name] for name in self.image_keys if name in members][:1]

    def _what_is_wrong(self, key: str, start: int, members: dict[str, Member]) -> tuple[str, str]:
        choices = [extension for extension in members if _is_image(extension)]
        hint = f" Choose by data.image_key={choices[0]}." if choices and self.image_keys is None else ""
        return (
            f"Shard '{self.shard}', key '{key}', byte {start}: a sample needs one image "
            f"({_dotted(self.image_keys or IMAGE_EXTENSIONS)}). It has {_dotted(list(members)[:10])}."
        ), hint

    def _pass_over(self, reason: tuple[str, ...], what: str, hint: str = "") -> None:
        """Count a sample that is passed over; of each reason the first one is kept in words."""
        self.passed_over += 1
        if reason in self._reasons:
            count, *told = self._reasons[reason]
            self._reasons[reason] = (count + 1, told[0], told[1])
        elif len(self._reasons) < MAX_REASONS:
            self._reasons[reason] = (1, what[:MAX_EXAMPLE], hint[:MAX_HINT])

    def _count_other(self, name: str) -> None:
        """Count a file that belongs to no sample by the end of its name."""
        extension = (
            f".{name.rpartition('.')[2].lower()[:20]}" if "." in name.rpartition("/")[2] else "without extension"
        )
        if extension in self._others or len(self._others) < MAX_REASONS:
            self._others[extension] += 1


def index_shard(
    path: Path, name: str | None = None, *, image_key: str | None = None
) -> tuple[ShardEntry, NDArray[np.int64]]:
    """Verify the structure of one shard from end to end and find its samples.

    Rows are int64 (samples, 6): image offset, image size, label (-1: none, -2: unreadable), the byte of the header from
    which the key can be read again, and height and width of the decoded image, 0 and 0 if its header says that it will
    be refused. `name` is the shard's own if the file has another; `image_key` the extension of the images, or several
    with `;` between them. Raises DataError naming the shard and the byte for a file that is damaged.
    """
    name = name or path.name
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size == 0:
            raise DataError(f"Shard '{name}' is empty (0 bytes). Copy it again or make it again.")
        sha256 = sha256_of(file)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = ShardRows(data, name, image_key)
            found.read()
    array = np.array(found.rows, dtype=np.int64).reshape(-1, COLUMNS)
    entry = ShardEntry(
        name=name,
        bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        sha256=sha256,
        samples=len(array),
        labelled=int((array[:, 2] >= 0).sum()),
        image_bytes=int(array[:, 1].sum()),
        pixel_bytes=int(pixel_bytes(array[:, SIZE]).sum()),
        widest=int(array[:, SIZE.stop - 1].max(initial=0)),
        passed_over=found.passed_over,
        other_files=found.other_files,
        example=found.example(),
    )
    return entry, array


def pixel_bytes(sizes_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of each decoded image (N,), from their heights and widths."""
    return 3 * sizes_N2[:, 0] * sizes_N2[:, 1]


def key_at(data: TarBytes, start: int, *, shard: str) -> str:
    """The key of the member whose header begins at byte `start`."""
    member = next(walk(data, shard=shard, start=start), None)
    if member is None:  # the index points past the end of the archive
        raise DataError(f"The index of shard '{shard}' is damaged. Delete it; it is rebuilt at the next start.")
    return split_name(member.name)[0]


def split_name(name: str) -> tuple[str, str]:
    """Key and extension by the WebDataset convention: the name is cut at the first dot of its last part.

    ("", "") for what is not part of a sample: no dot, a hidden file, or a `__meta__` member.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not (stem and dot and extension) or any(part.startswith("__") for part in name.split("/")):
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()


def _dotted(extensions: Sequence[str]) -> str:
    return ", ".join(f".{extension}" for extension in extensions)


def _is_image(extension: str) -> bool:
    """Whether a member is an image by the last part of its extension: `input.jpg` is one."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _label(data: TarBytes, members: dict[str, Member]) -> int:
    """The `.cls` number, or the integer `label` or `cls` of a `.json` object; -1 without, -2 for other things."""
    for extension in LABEL_EXTENSIONS:
        member = members.get(extension)
        if member is None:
            continue
        try:
            if member.size > MAX_LABEL_BYTES:
                return INVALID_LABEL
            text = data[member.offset : member.offset + member.size].decode("utf-8")
            value = int(text) if extension == "cls" else _json_label(json.loads(text))
        except (ValueError, RecursionError):
            return INVALID_LABEL
        if value is not None:
            return INVALID_LABEL if value >= 2**63 else max(value, NO_LABEL)
    return NO_LABEL


def _json_label(value: object) -> int | None:
    if isinstance(value, dict):
        for name in LABEL_KEYS:
            if isinstance(value.get(name), int) and not isinstance(value[name], bool):
                return value[name]
    return None
