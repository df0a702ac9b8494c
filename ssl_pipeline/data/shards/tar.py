"""Walk a tar file by its headers: POSIX ustar and pax, GNU long names (POSIX.1-2017 pax, GNU tar manual)."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

from ssl_pipeline.data.errors import DataError

BLOCK = 512
MAX_EXTENDED_HEADER = 1 << 20  # a name or a set of pax records; real ones are a few hundred bytes
REGULAR = b"0\x007"
DIRECTORY = b"5"
GNU_LONG_NAME = b"L"
GNU_LONG_LINK = b"K"
PAX_MEMBER = b"x"
PAX_GLOBAL = b"g"
REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}

TarBytes = bytes | mmap.mmap


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file: its name, the byte of its first header block, and where its content lies."""

    name: str
    start: int
    offset: int
    size: int


def walk(data: TarBytes, *, shard: str, start: int = 0) -> Iterator[Member]:
    """Yield the regular files from the header at byte `start` on; directories are passed over.

    Every header checksum, every bound and the end-of-archive marker are verified. Nothing is extracted, so names
    are only names. Raises DataError with the shard and the byte for anything truncated, damaged or unusual.
    """
    position = first = start
    long_name: str | None = None
    records: dict[str, str] = {}
    while True:
        header = data[position : position + BLOCK]
        if len(header) < BLOCK:
            raise DataError(
                f"Shard '{shard}' is truncated: it ends at byte {len(data)} without an end-of-archive marker. "
                "Copy it again or make it again."
            )
        if not any(header):
            _verify_end(data, position, shard)
            return
        _verify_checksum(header, position, shard)
        kind = header[156:157]
        content = position + BLOCK
        size = 0 if kind == DIRECTORY else _size_of(header, records, position, shard)
        if content + size > len(data):
            raise DataError(
                f"Shard '{shard}' is truncated: the member at byte {first} ends at byte {content + size}, "
                f"the file at byte {len(data)}. Copy it again or make it again."
            )
        position = content + -(-size // BLOCK) * BLOCK
        if kind in (GNU_LONG_NAME, GNU_LONG_LINK, PAX_MEMBER, PAX_GLOBAL):
            if size > MAX_EXTENDED_HEADER:
                raise DataError(f"Shard '{shard}' has an extended header of {size} bytes at byte {first}.")
            body = data[content : content + size]
            if kind == GNU_LONG_NAME:
                long_name = _text(body)
            elif kind == PAX_MEMBER:
                records = _pax_records(body, content, shard)
            elif kind == PAX_GLOBAL and _pax_records(body, content, shard).keys() & {"path", "size"}:
                raise DataError(f"Shard '{shard}' sets a path or size for all members at byte {first}.")
            continue
        name = records.get("path") or long_name or _short_name(header)
        if kind in REGULAR and not name.endswith("/"):
            yield Member(name, first, content, size)
        elif kind not in REGULAR and kind != DIRECTORY:
            what = REFUSED.get(kind, f"of the unknown type {kind!r}")
            raise DataError(f"Shard '{shard}': the member {name!r} at byte {first} is {what}, not a file.")
        first, long_name, records = position, None, {}


def _verify_checksum(header: bytes, position: int, shard: str) -> None:
    field = header[148:156]
    expected = _octal(field)
    total = sum(header) - sum(field) + 8 * ord(" ")
    if expected == total:
        return
    signed = total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])  # some old writers
    if expected != signed:
        compressed = position == 0 and header[:2] == b"\x1f\x8b"
        hint = "it is gzip-compressed: unpack it first" if compressed else "its header checksum is wrong"
        raise DataError(f"Shard '{shard}' is damaged or not a tar file at byte {position}: {hint}.")


def _verify_end(data: TarBytes, position: int, shard: str) -> None:
    while position < len(data):
        block = data[position : position + (1 << 16)]
        if block.count(0) != len(block):
            raise DataError(
                f"Shard '{shard}' goes on after the end-of-archive marker, near byte {position}: "
                "two tar files joined, or damage."
            )
        position += len(block)


def _size_of(header: bytes, records: dict[str, str], position: int, shard: str) -> int:
    if any(name.startswith("GNU.sparse") for name in records):
        raise DataError(f"Shard '{shard}' has a sparse file at byte {position}, which is not supported.")
    field = header[124:136]
    size: int | None
    if "size" in records:
        size = int(records["size"]) if records["size"].isascii() and records["size"].isdigit() else None
    elif field[0] == 0x80:  # GNU: base 256 where eleven octal digits do not suffice
        size = int.from_bytes(field[1:], "big")
    else:
        size = _octal(field)
    if size is None:
        raise DataError(f"Shard '{shard}' is damaged at byte {position}: no valid member size.")
    return size


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\x00", 1)[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if all(0x30 <= digit < 0x38 for digit in digits) else None


def _text(field: bytes) -> str:
    return field.split(b"\x00", 1)[0].decode("utf-8", errors="backslashreplace")


def _short_name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\x00" else name


def _pax_records(body: bytes, position: int, shard: str) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n", LENGTH counting the whole record."""
    records = {}
    while body.strip(b"\x00"):
        length_field, _, _ = body.partition(b" ")
        length = int(length_field) if length_field.isdigit() and len(length_field) < 8 else 0
        record = body[len(length_field) + 1 : length]
        key, equals, value = record[:-1].partition(b"=")
        if not (0 < length <= len(body) and equals and record.endswith(b"\n")):
            raise DataError(f"Shard '{shard}' has a damaged pax header at byte {position}.")
        records[_text(key)] = value.decode("utf-8", errors="backslashreplace")
        body = body[length:]
    return records
