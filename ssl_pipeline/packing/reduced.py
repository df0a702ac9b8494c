"""Images made quick to decode: at most a given number of pixels on their shorter side, as baseline JPEG with 4:2:0
chroma."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ssl_pipeline.data.decode import DecodeError, decode_image

MAX_JPEG_SIDE = 65_500  # libjpeg's
START, START_OF_SCAN, BASELINE_FRAME = b"\xff\xd8", 0xDA, 0xC0
TABLES = (0xDB, 0xC4, 0xDD)  # quantisation, Huffman, restart interval
JFIF, ADOBE = 0xE0, 0xEE  # these two say how the colours are stored
DROPPED = (0xFE, *(marker for marker in range(0xE0, 0xF0) if marker not in (JFIF, ADOBE)))  # EXIF, ICC, comments, ...
THREE_COMPONENTS_420 = bytes((3, 0x22, 0x11, 0x11))  # how many, and the sampling of each


@dataclass(frozen=True)
class Packing:
    """How images are stored: pixels of the shorter side at most, and JPEG quality."""

    short_side: int
    quality: int


def pack(data: bytes, packing: Packing) -> bytes:
    """The image of a file as baseline 4:2:0 JPEG, upright, without metadata, its shorter side at most `short_side`.

    Larger images are reduced with an antialiased bicubic filter, none is enlarged; transparent pixels become white. One
    that is such a JPEG already, small enough and no larger than its new encoding, keeps its encoded pixels and loses
    only its metadata. Raises DecodeError for what decode_image refuses, and what is too large for a JPEG.
    """
    pixels = decode_image(data)
    height, width = packed_size(pixels.shape[0], pixels.shape[1], packing.short_side)
    image = Image.fromarray(pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=packing.quality, subsampling="4:2:0", optimize=False, progressive=False)
    encoded = file.getvalue()
    if (height, width) != pixels.shape[:2]:
        return encoded
    kept = baseline_without_metadata(data)
    if kept is None or len(kept) > len(encoded) or not np.array_equal(decode_image(kept), pixels):
        return encoded  # the pixels differ where the metadata turned the image
    return kept


def packed_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the shorter side at most `short_side`; DecodeError if the longer one fits no JPEG."""
    scale = min(1.0, short_side / min(height, width))
    size = round(height * scale), round(width * scale)
    if max(size) > MAX_JPEG_SIDE:
        raise DecodeError(f"{size[1]}x{size[0]} pixels are too large for a JPEG, whose limit is {MAX_JPEG_SIDE}")
    return size


def baseline_without_metadata(data: bytes) -> bytes | None:
    """A baseline JPEG of three components with 4:2:0 chroma, less EXIF, ICC and comments; None for any other file."""
    if not data.startswith(START):
        return None
    parts, position, is_baseline_420 = [START], 2, False
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == START_OF_SCAN:
            return b"".join([*parts, data[position:]]) if is_baseline_420 else None
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position:end]
        if marker == BASELINE_FRAME:
            frame = segment[9:]  # marker, length, precision, height and width come before
            is_baseline_420 = (frame[:1] + frame[2::3]) == THREE_COMPONENTS_420
        if marker in (BASELINE_FRAME, JFIF, ADOBE, *TABLES):
            parts.append(segment)
        elif marker not in DROPPED:
            return None
        position = end
    return None
