"""What an image file says besides its pixels: the orientation, wherever it is, and how to leave all of it out.

EXIF: CIPA DC-008, a TIFF directory; XMP: ISO 16684, an XML packet; both may be in JPEG (APP1), PNG (eXIf and text
chunks before or behind the pixels, ImageMagick's "Raw profile" among them) and WebP.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence

from ssl_pipeline.data.headers import (
    APP1,
    EXIF,
    START_OF_SCAN,
    JpegHeader,
    Span,
    image_extension,
    is_plain_png,
    png_chunks,
    webp_chunks,
)
from ssl_pipeline.data.shards.tar import TarBytes

# JPEG
JFIF, ADOBE, COMMENT = 0xE0, 0xEE, 0xFE  # the first two say how the colours are stored
ALONE = {0x00, 0x01, *range(0xD0, 0xD9)}  # markers without a length
DROPPED = {COMMENT, *range(0xE0, 0xF0)} - {JFIF, ADOBE}
# PNG
SIGNATURE_BYTES = 8
TRANSPARENCY, EXIF_CHUNK = b"tRNS", b"eXIf"
XMP_KEYWORD = b"XML:com.adobe.xmp"
PROFILES = (b"Raw profile type exif", b"Raw profile type APP1", b"Raw profile type xmp")
MAX_TEXT_BYTES = 16 << 20
# WebP
PIXEL_CHUNKS = (b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF")
PIXEL_FLAGS = 0x12  # alpha, animation

ORIENTATION = 0x0112
VALUES = {1: "B", 3: "H", 4: "I"}  # kinds of whole numbers
TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
IN_XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])")


def orientation_of(data: TarBytes, start: int, end: int, header: JpegHeader | None = None) -> int:
    """1 to 8 by EXIF's table, 1 without one: what the EXIF data say, else the XMP packet. Damaged data say nothing.

    `header` is that of a JPEG file, where it is known already.
    """
    extension = "jpg" if header is not None else image_extension(data, start)
    if extension == "png":
        return 1 if is_plain_png(data, start, end) else orientation_in(list(_png_packets(data, start, end)))
    spans: Sequence[Span] = ()
    if header is not None:
        spans = header.metadata
    elif extension == "jpg":
        segments = jpeg_segments(data, start, end)
        spans = [(first + 4, after) for marker, first, after in segments if marker == APP1]
    elif extension == "webp" and data[start + 12 : start + 16] == b"VP8X":
        spans = [(first, last) for kind, first, last in webp_chunks(data, start, end) if kind in (b"EXIF", b"XMP ")]
    return orientation_in([data[first:last] for first, last in spans]) if spans else 1


def orientation_in(packets: Sequence[bytes]) -> int:
    """The orientation in EXIF data and XMP packets, the former first; 1 without one."""
    for packet in packets:
        if found := exif_orientation(packet.removeprefix(EXIF)):
            return found
    for packet in packets:
        if match := IN_XMP.search(packet):
            return int(match[1])
    return 1


def exif_orientation(exif: bytes) -> int:
    """The orientation in EXIF data (a TIFF directory), 1 to 8; 0 without one."""
    order = TIFF_ORDERS.get(exif[:4])
    if order is None:
        return 0
    found = 0
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, directory)
        entries = exif[directory + 2 : directory + 2 + 12 * count]
        for tag, kind, number, value in struct.iter_unpack(order + "HHI4s", entries[: len(entries) // 12 * 12]):
            if tag == ORIENTATION and number == 1 and kind in VALUES:
                (value,) = struct.unpack_from(order + VALUES[kind], value)
                found = value if 1 <= value <= 8 else found
    except struct.error:
        return 0
    return found


def without_metadata(data: bytes) -> bytes:
    """The same image file with nothing but what its pixels depend on; any other file comes back unchanged.

    Metadata may be damaged or larger than a decoder allows, and its pixels are fine.
    """
    extension = image_extension(data)
    if extension == "png":
        return data if is_plain_png(data, 0, len(data)) else _png_pixels(data)
    if extension == "webp":
        return _webp_pixels(data)
    return _jpeg_pixels(data) if extension == "jpg" else data


def jpeg_segments(data: TarBytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Marker, first byte and end of each segment up to the start of scan, which is the last; what is between is passed.

    Decoders tolerate fill bytes and garbage between segments, and so does this.
    """
    position = start + 2
    while position + 4 <= end:
        position = data.find(b"\xff", position, end - 3)
        if position < 0:
            return
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in ALONE:
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        after = min(position + 2 + max(length, 2), end)
        yield marker, position, after
        if marker == START_OF_SCAN:
            return
        position = after


def _png_packets(data: TarBytes, start: int, end: int) -> Iterator[bytes]:
    """EXIF data and XMP packets; a chunk with a wrong checksum is passed over, as PNG decoders do."""
    for kind, first, last in png_chunks(data, start, end):
        if kind == EXIF_CHUNK:
            if _is_whole(data, first, last, end):
                yield data[first:last]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, found, _ = data[first : min(first + 80, last)].partition(b"\0")
            if found and (keyword == XMP_KEYWORD or keyword in PROFILES) and _is_whole(data, first, last, end):
                text = _png_text(kind, data[first + len(keyword) + 1 : min(last, first + MAX_TEXT_BYTES)])
                yield text if keyword == XMP_KEYWORD else _raw_profile(text)


def _is_whole(data: TarBytes, first: int, last: int, end: int) -> bool:
    return last + 4 <= end and zlib.crc32(data[first - 4 : last]).to_bytes(4, "big") == data[last : last + 4]


def _png_text(kind: bytes, content: bytes) -> bytes:
    """The text of a chunk behind its keyword, at most MAX_TEXT_BYTES of it; nothing if it is damaged."""
    is_compressed = kind == b"zTXt"
    if kind == b"iTXt":
        is_compressed, (_, _, content) = content[:1] == b"\1", _split_twice(content[2:])
    elif is_compressed:
        content = content[1:]
    if not is_compressed:
        return content
    try:
        return zlib.decompressobj().decompress(content, MAX_TEXT_BYTES)
    except zlib.error:
        return b""


def _split_twice(content: bytes) -> tuple[bytes, bytes, bytes]:
    """Language, translated keyword and text of an iTXt chunk."""
    language, _, rest = content.partition(b"\0")
    translated, _, text = rest.partition(b"\0")
    return language, translated, text


def _raw_profile(text: bytes) -> bytes:
    """ImageMagick's form: an empty line, a name, a length, and the bytes in hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _jpeg_pixels(data: bytes) -> bytes:
    parts = [data[:2]]
    for marker, first, after in jpeg_segments(data, 0, len(data)):
        if marker == START_OF_SCAN:
            return b"".join([*parts, data[first:]])
        if marker not in DROPPED:
            parts.append(data[first:after])
    return data


def _png_pixels(data: bytes) -> bytes:
    parts = [data[:SIGNATURE_BYTES]]
    for kind, first, last in png_chunks(data, 0, len(data)):
        is_critical = not kind[:1].islower()
        if is_critical or (kind == TRANSPARENCY and _is_whole(data, first, last, len(data))):
            parts.append(data[first - 8 : last + 4])
    return b"".join(parts)


def _webp_pixels(data: bytes) -> bytes:
    if data[12:16] != b"VP8X" or len(data) < 30:
        return data
    parts = []
    for kind, first, last in webp_chunks(data, 0, len(data)):
        if kind in PIXEL_CHUNKS:
            parts.append(data[first - 8 : last + (last - first) % 2])
    if not parts or len(parts[0]) < 18:
        return data
    parts[0] = parts[0][:8] + bytes([parts[0][8] & PIXEL_FLAGS]) + parts[0][9:]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body
