"""What the header of a JPEG, PNG or WebP file says about its image, read in a few microseconds and without decoding.

JPEG: ITU-T T.81 annex B; PNG: https://www.w3.org/TR/png-3; WebP: RFC 9649.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ssl_pipeline.data.shards.tar import TarBytes

Span = tuple[int, int]  # first byte and end

# JPEG
START_OF_SCAN, APP1 = 0xDA, 0xE1
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame, by kind of coding
SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restart interval, comment, application data
SEGMENT = struct.Struct(">BBH")  # 0xFF, marker, length
FRAME = struct.Struct(">BHHB")  # bits, height, width, components
EXIF = b"Exif\0\0"
# PNG
CHUNK = struct.Struct(">I4s")
IHDR = struct.Struct(">II")  # width, height
PIXEL_CHUNKS = (b"IDAT", b"PLTE")
# WebP
RIFF = struct.Struct("<4sI")
KEY_FRAME = b"\x9d\x01\x2a"
LOSSLESS = b"\x2f"


def image_extension(data: TarBytes, start: int = 0) -> str | None:
    """jpg, png or webp by the first bytes of a file, whatever it is called; None for anything else."""
    head = data[start : start + 12]
    if head[:3] == b"\xff\xd8\xff":
        return "jpg"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def stored_size(data: TarBytes, start: int, end: int) -> tuple[int, int] | None:
    """Height and width of the image file at `data[start:end]` as they are stored, before any turning.

    That is the size of what is decoded, if anything is. None where only decoding can tell: for anything else, or an
    unusual file.
    """
    try:
        return _SIZES[image_extension(data, start) or ""](data, start, end)
    except (KeyError, struct.error):  # no such file; one that ends in the middle of its header
        return None


class JpegHeader(NamedTuple):
    """What comes before the first scan: kind of frame, bits per colour, size, the APP1 segments; where it begins."""

    frame: int
    bits: int
    height: int
    width: int
    components: int
    metadata: tuple[Span, ...]
    scan: int


def jpeg_header(data: TarBytes, start: int, end: int) -> JpegHeader | None:
    """The header of a JPEG file whose segments follow each other without a gap; None for any other file."""
    if data[start : start + 2] != b"\xff\xd8":
        return None
    frame: tuple[int, int, int, int, int] | None = None
    metadata, position = list[Span](), start + 2
    while position + 4 <= end:
        sign, marker, length = SEGMENT.unpack_from(data, position)
        after = position + 2 + length
        if sign != 0xFF:
            return None
        if marker == START_OF_SCAN:
            return None if frame is None else JpegHeader(*frame, tuple(metadata), position)
        if marker in FRAMES:
            if frame is not None or length < 8 or after > end:
                return None
            frame = marker, *FRAME.unpack_from(data, position + 4)
        elif marker not in SEGMENTS:
            return None
        elif marker == APP1:
            metadata.append((position + 4, min(after, end)))
        position = after
    return None


def png_chunks(data: TarBytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of each chunk's content, up to the end of the image; the last may be cut off."""
    position = start + 8
    while position + 8 <= end:
        length, kind = CHUNK.unpack_from(data, position)
        yield kind, position + 8, min(position + 8 + length, end)
        if kind == b"IEND":
            return
        position += 12 + length


def is_plain_png(data: TarBytes, start: int, end: int) -> bool:
    """Whether a PNG file holds one header and pixels, and nothing else: most small images do."""
    position = start + 8
    only: tuple[bytes, ...] = (b"IHDR",)
    while position + 8 <= end:
        length, kind = CHUNK.unpack_from(data, position)
        if kind == b"IEND":
            return True
        if kind not in only:
            return False
        only = PIXEL_CHUNKS
        position += 12 + length
    return False


def webp_chunks(data: TarBytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of each chunk's content; the last may be cut off."""
    _, length = RIFF.unpack_from(data, start)
    end, position = min(end, start + 8 + length), start + 12
    while position + 8 <= end:
        kind, length = RIFF.unpack_from(data, position)
        yield kind, position + 8, min(position + 8 + length, end)
        position += 8 + length + length % 2


def _jpeg_size(data: TarBytes, start: int, end: int) -> tuple[int, int] | None:
    header = jpeg_header(data, start, end)
    return None if header is None else (header.height, header.width)


def _png_size(data: TarBytes, start: int, end: int) -> tuple[int, int] | None:
    length, kind = CHUNK.unpack_from(data, start + 8)
    width, height = IHDR.unpack_from(data, start + 16)
    if kind != b"IHDR" or length < 13 or start + 26 > end:
        return None
    first = start + 16
    if not is_plain_png(data, start, end) and any(
        kind == b"IHDR" and place != first for kind, place, _ in png_chunks(data, start, end)
    ):
        return None
    return height, width


def _webp_size(data: TarBytes, start: int, end: int) -> tuple[int, int] | None:
    kind, _ = RIFF.unpack_from(data, start + 12)
    body = data[start + 20 : min(start + 30, end)]
    if kind == b"VP8 " and body[3:6] == KEY_FRAME:
        width, height = struct.unpack_from("<HH", body, 6)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L" and body[:1] == LOSSLESS:
        (bits,) = struct.unpack_from("<I", body, 1)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind != b"VP8X" or len(body) < 10:
        return None
    width, height = (int.from_bytes(body[place : place + 3], "little") + 1 for place in (4, 7))
    return height, width


_SIZES = {"jpg": _jpeg_size, "png": _png_size, "webp": _webp_size}
