"""What the head of a JPEG, PNG or WebP file says of its image, read in a few microseconds and without decoding.

JPEG: ITU-T T.81 annex B; PNG: https://www.w3.org/TR/png-3; WebP: RFC 9649; EXIF: CIPA DC-008, a TIFF directory.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ssl_pipeline.data.shards.tar import TarBytes

# JPEG
START_OF_SCAN, APP1 = 0xDA, 0xE1
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame, by kind of coding
SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restart interval, comment, application data
SEGMENT = struct.Struct(">BBH")  # 0xFF, marker, length
FRAME = struct.Struct(">BHHB")  # bits, height, width, components
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# PNG
CHUNK = struct.Struct(">I4s")
IHDR = struct.Struct(">IIBB")  # width, height, bits, colour type
TRUE_COLOUR = 2
TEXTS, XMP_KEYWORD = (b"tEXt", b"zTXt", b"iTXt"), b"XML:com.adobe.xmp"
# WebP
RIFF = struct.Struct("<4sI")
KEY_FRAME = b"\x9d\x01\x2a"
LOSSLESS = b"\x2f"
HAS_EXIF, HAS_XMP = 0x08, 0x04
# EXIF
ORIENTATION = 0x0112
SHORT = 3
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}


def image_extension(data: TarBytes, start: int = 0) -> str | None:
    """jpg, png or webp by the first bytes of a file, whatever it is called; None for anything else."""
    head = data[start : start + 12]
    if head[:3] == b"\xff\xd8\xff":
        return "jpg"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def upright_size(data: TarBytes, start: int, end: int) -> tuple[int, int] | None:
    """Height and width of the image file at `data[start:end]`, turned as its EXIF data say.

    That is the size of what is decoded, if anything is. None where only decoding can tell: for what is no such file,
    or an unusual one.
    """
    try:
        return _SIZES[image_extension(data, start) or ""](data, start, end)
    except (KeyError, struct.error):  # no such file; one that ends in the middle of its head
        return None


class JpegHeader(NamedTuple):
    """What stands before the first scan: the kind of frame, bits per colour, size, and where EXIF data lie, if any."""

    frame: int
    bits: int
    height: int
    width: int
    components: int
    exif: tuple[int, int] | None
    has_xmp: bool


def jpeg_header(data: TarBytes, start: int, end: int) -> JpegHeader | None:
    """The header of a JPEG file whose segments follow each other without a gap; None for any other file."""
    if data[start : start + 2] != b"\xff\xd8":
        return None
    frame: tuple[int, int, int, int, int] | None = None
    exif: tuple[int, int] | None = None
    has_xmp, position = False, start + 2
    while position + 4 <= end:
        sign, marker, length = SEGMENT.unpack_from(data, position)
        after = position + 2 + length
        if sign != 0xFF:
            return None
        if marker == START_OF_SCAN:
            return None if frame is None else JpegHeader(*frame, exif, has_xmp)
        if marker in FRAMES:
            if frame is not None or length < 8 or after > end:
                return None
            frame = marker, *FRAME.unpack_from(data, position + 4)
        elif marker not in SEGMENTS:
            return None
        elif marker == APP1:
            body = data[position + 4 : min(after, position + 4 + len(XMP))]
            if body[:4] == EXIF[:4]:
                if exif is not None or body[:6] != EXIF or after > end:
                    return None
                exif = position + 10, after
            has_xmp = has_xmp or body == XMP
        position = after
    return None


def _jpeg_size(data: TarBytes, start: int, end: int) -> tuple[int, int] | None:
    header = jpeg_header(data, start, end)
    if header is None:
        return None
    exif = None if header.exif is None else data[slice(*header.exif)]
    return _turned(header.height, header.width, exif, has_xmp=header.has_xmp)


def _png_size(data: TarBytes, start: int, end: int) -> tuple[int, int] | None:
    """EXIF data may come after the pixels; Pillow turns by these if it has more to do than to decode."""
    length, kind = CHUNK.unpack_from(data, start + 8)
    width, height, _, colours = IHDR.unpack_from(data, start + 16)
    if kind != b"IHDR" or start + 26 > end:
        return None
    exif: bytes | None = None
    is_plain, has_xmp, has_pixels = colours == TRUE_COLOUR, False, False
    position = start + 20 + length
    while position + 8 <= end:
        length, kind = CHUNK.unpack_from(data, position)
        content = position + 8
        if kind == b"IDAT":
            if is_plain:
                break
            has_pixels = True
        elif kind == b"IEND":
            break
        elif kind == b"IHDR":
            return None
        elif kind == b"tRNS":
            is_plain = False
        elif kind == b"eXIf":
            if has_pixels or exif is not None or content + length > end:
                return None
            exif, is_plain = data[content : content + length], False
        elif kind in TEXTS and data[content : content + len(XMP_KEYWORD)] == XMP_KEYWORD:
            has_xmp = True
        position = content + length + 4
    return _turned(height, width, exif, has_xmp=has_xmp)


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
    exif = _webp_exif(data, start, end) if body[0] & HAS_EXIF else None
    return _turned(height, width, exif, has_xmp=bool(body[0] & HAS_XMP))


def _webp_exif(data: TarBytes, start: int, end: int) -> bytes | None:
    _, length = RIFF.unpack_from(data, start)
    end, position = min(end, start + 8 + length), start + 12
    while position + 8 <= end:
        kind, length = RIFF.unpack_from(data, position)
        if kind == b"EXIF":
            return data[position + 8 : min(position + 8 + length, end)].removeprefix(EXIF)
        position += 8 + length + length % 2
    return None


def _turned(height: int, width: int, exif: bytes | None, *, has_xmp: bool) -> tuple[int, int] | None:
    if exif is None or height == width:
        return height, width
    orientation = exif_orientation(exif)
    if orientation is None or (orientation == 0 and has_xmp):  # Pillow looks for one in the XMP packet then
        return None
    return (width, height) if 5 <= orientation <= 8 else (height, width)


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in EXIF data (a TIFF directory), 0 without one; None for data that are damaged, or unusual."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    (directory,) = struct.unpack_from(order + "I", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, directory)
    entries = exif[directory + 2 : directory + 2 + 12 * count]
    if len(entries) != 12 * count:
        return None
    found = 0
    for tag, kind, number, value in struct.iter_unpack(order + "HHI4s", entries):
        size = number * TYPE_BYTES.get(kind, 0)
        if size > 4 and struct.unpack(order + "I", value)[0] + size > len(exif):
            return None
        if tag == ORIENTATION:
            if found or (kind, number) != (SHORT, 1):
                return None
            found = struct.unpack(order + "H", value[:2])[0] or 1  # 0 turns nothing, and is not "none"
    return found


_SIZES = {"jpg": _jpeg_size, "png": _png_size, "webp": _webp_size}
