"""Images are turned as they say, wherever they say it, and no image is lost for what stands beside its pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from PIL import Image

from ssl_pipeline.data import decode
from ssl_pipeline.data.decode import DecodeError, decode_image, decoded_size
from ssl_pipeline.data.metadata import exif_orientation
from ssl_pipeline.data.shards.open import open_shards

WriteTar = Callable[..., Path]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 12, 3), dtype=np.uint8))


def saved(format: str, image: Image.Image = IMAGE, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiff(orientation: int, *, order: str = "<", kind: int = 3, before: bytes = b"") -> bytes:
    """EXIF data with one entry; SHORT as a rule, though some writers use LONG or BYTE."""
    value = struct.pack(order + {1: "B", 3: "H", 4: "I"}[kind], orientation).ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    count = len(before) // 12 + 1
    return head + struct.pack(order + "H", count) + before + struct.pack(order + "HHI", 0x0112, kind, 1) + value


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def app(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def jpeg_with(*segments: bytes, **options: object) -> bytes:
    data = saved("JPEG", **options)
    return data[:2] + b"".join(segments) + data[2:]


def chunk(kind: bytes, content: bytes, *, spoilt: bool = False) -> bytes:
    checksum = zlib.crc32(kind + content) ^ spoilt
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_with(*chunks: bytes, before: bytes = b"IDAT", image: Image.Image = IMAGE) -> bytes:
    data = saved("PNG", image)
    place = data.index(before) - 4
    return data[:place] + b"".join(chunks) + data[place:]


def profile(content: bytes, name: str = "exif") -> bytes:
    return f"\n{name}\n{len(content):8}\n".encode() + content.hex().encode() + b"\n"


def webp_with(kind: bytes, content: bytes, *, flags: int) -> bytes:
    lossless = saved("WEBP", lossless=True)
    (length,) = struct.unpack_from("<I", lossless, 16)
    pixels = lossless[12 : 20 + length + length % 2]
    head = b"VP8X" + struct.pack("<I", 10) + bytes((flags, 0, 0, 0, 11, 0, 0, 6, 0, 0))
    extra = kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    body = b"WEBP" + head + pixels + extra
    return b"RIFF" + struct.pack("<I", len(body)) + body


PLACES: dict[str, Callable[[int], bytes]] = {
    "JPEG EXIF": lambda n: jpeg_with(app(0xE1, b"Exif\0\0" + tiff(n))),
    "JPEG EXIF, big endian": lambda n: jpeg_with(app(0xE1, b"Exif\0\0" + tiff(n, order=">"))),
    "JPEG EXIF as LONG": lambda n: jpeg_with(app(0xE1, b"Exif\0\0" + tiff(n, kind=4))),
    "JPEG EXIF behind another APP1": lambda n: jpeg_with(app(0xE1, b"other"), app(0xE1, b"Exif\0\0" + tiff(n))),
    "JPEG EXIF, an entry that points nowhere": lambda n: jpeg_with(
        app(0xE1, b"Exif\0\0" + tiff(n, before=struct.pack("<HHII", 0x010F, 2, 99, 10**6)))
    ),
    "JPEG EXIF behind fill bytes": lambda n: jpeg_with(b"\xff\xff" + app(0xE1, b"Exif\0\0" + tiff(n))),
    "JPEG EXIF, progressive": lambda n: jpeg_with(app(0xE1, b"Exif\0\0" + tiff(n)), progressive=True),
    "JPEG XMP": lambda n: jpeg_with(app(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(n))),
    "PNG eXIf": lambda n: png_with(chunk(b"eXIf", tiff(n))),
    "PNG eXIf with a JPEG's prefix": lambda n: png_with(chunk(b"eXIf", b"Exif\0\0" + tiff(n))),
    "PNG eXIf behind the pixels": lambda n: png_with(chunk(b"eXIf", tiff(n)), before=b"IEND"),
    "PNG eXIf behind the pixels, gray": lambda n: png_with(
        chunk(b"eXIf", tiff(n)), before=b"IEND", image=IMAGE.convert("L")
    ),
    "PNG XMP": lambda n: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(n))),
    "PNG XMP, compressed": lambda n: png_with(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0XMP\0" + zlib.compress(xmp(n))), before=b"IEND"
    ),
    "PNG of ImageMagick": lambda n: png_with(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile(b"Exif\0\0" + tiff(n))))
    ),
    "PNG of ImageMagick, APP1": lambda n: png_with(
        chunk(b"tEXt", b"Raw profile type APP1\0" + profile(b"Exif\0\0" + tiff(n), "generic"))
    ),
    "WebP EXIF": lambda n: webp_with(b"EXIF", tiff(n), flags=0x08),
    "WebP EXIF with a JPEG's prefix": lambda n: webp_with(b"EXIF", b"Exif\0\0" + tiff(n), flags=0x08),
    "WebP EXIF without its flag": lambda n: webp_with(b"EXIF", tiff(n), flags=0),
    "WebP XMP": lambda n: webp_with(b"XMP ", xmp(n), flags=0x04),
}


def shown(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """EXIF's table in its own words: which side of what is stored is the top, and which the left."""
    rows, columns = pixels[::-1], pixels[:, ::-1]
    both = rows[:, ::-1]
    return {
        1: pixels,
        2: columns,
        3: both,
        4: rows,
        5: pixels.swapaxes(0, 1),
        6: rows.swapaxes(0, 1),
        7: both.swapaxes(0, 1),
        8: columns.swapaxes(0, 1),
    }[orientation]


@pytest.mark.parametrize("place", PLACES)
def test_an_image_is_turned_wherever_it_says_so(place: str) -> None:
    stored = decode_image(PLACES[place](1))
    assert stored.shape == (7, 12, 3)
    for orientation in range(1, 9):
        data = PLACES[place](orientation)
        pixels = decode_image(data)
        assert_array_equal(pixels, shown(stored, orientation))
        assert decoded_size(data) == pixels.shape[:2]
        assert pixels.flags.c_contiguous
        buffer = np.zeros(300, dtype=np.uint8)
        assert_array_equal(decode_image(data, buffer), pixels)
        assert_array_equal(buffer[: pixels.size], pixels.flatten())


def test_the_index_has_the_sizes_of_what_is_decoded(tmp_path: Path, write_tar: WriteTar) -> None:
    files = {f"{number:02d}.jpg": make(6) for number, make in enumerate(PLACES.values())}
    write_tar(tmp_path / "a.tar", files)
    index = open_shards(tmp_path)
    expected = [decode_image(data).shape[:2] for data in files.values()]
    assert index.sizes().tolist() == [list(size) for size in expected] == [[12, 7]] * len(files)


def test_exif_comes_before_xmp_and_what_is_no_orientation_turns_nothing() -> None:
    both = app(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(3)), app(0xE1, b"Exif\0\0" + tiff(6))
    assert decode_image(jpeg_with(*both)).shape == (12, 7, 3)
    for value in (0, 9, 65535):
        assert exif_orientation(tiff(value)) == 0
        assert decode_image(jpeg_with(app(0xE1, b"Exif\0\0" + tiff(value)))).shape == (7, 12, 3)
    assert exif_orientation(b"") == exif_orientation(b"II*\0\xff\xff\xff\xff") == exif_orientation(tiff(6)[:13]) == 0


DAMAGE: dict[str, bytes] = {
    "2 MB of text": png_with(chunk(b"tEXt", b"Comment\0" + bytes(2 << 20))),
    "2 MB of text, compressed": png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20)))),
    "2 MB of text in XMP": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bytes(2 << 20))),
    "100 MB of text, compressed": png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20)))),
    "2 MB of text behind the pixels": png_with(chunk(b"tEXt", b"Comment\0" + bytes(2 << 20)), before=b"IEND"),
    **{
        f"a bad checksum in {kind.decode()}": png_with(chunk(kind, bytes(9), spoilt=True))
        for kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"pHYs", b"iCCP", b"tIME", b"gAMA", b"tRNS", b"acTL", b"fcTL")
    },
    "a chunk too short": png_with(chunk(b"pHYs", b""), chunk(b"gAMA", b"1"), chunk(b"iCCP", b"x"), chunk(b"acTL", b"")),
    "text that is not compressed": png_with(chunk(b"zTXt", b"Raw profile type exif\0\0garbage")),
    "a profile that is not hexadecimal": png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz")),
    "EXIF that is none": webp_with(b"EXIF", b"garbage", flags=0x08),
    "an unknown WebP chunk": webp_with(b"????", b"garbage", flags=0x2C),
    "a WebP cut off in its EXIF data": webp_with(b"EXIF", bytes(1000), flags=0x08)[:-500],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metadata_cost_no_pixels(damage: str) -> None:
    assert_array_equal(decode_image(DAMAGE[damage]), np.asarray(IMAGE))
    assert decoded_size(DAMAGE[damage]) == (7, 12)


@pytest.mark.parametrize("simplejpeg", [True, False])
def test_damaged_segments_of_a_jpeg_cost_no_pixels(simplejpeg: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not simplejpeg:
        monkeypatch.setattr(decode, "decode_jpeg", None)
    expected = decode_image(saved("JPEG"))
    noise = np.random.default_rng(1).bytes(300)
    for marker in (*range(0xE1, 0xEE), 0xEF, 0xFE):
        starts = (
            b"",
            b"Exif\0\0II*\0\xff\xff",
            b"MPF\0II*\0\xff\xff",
            b"ICC_PROFILE\0",
            b"Photoshop 3.0\x008BIM",
            b"FPXR\0",
        )
        for start in starts:
            assert_array_equal(decode_image(jpeg_with(app(marker, start + noise), app(marker, start))), expected)


def test_damaged_pixels_are_still_refused() -> None:
    data = bytearray(png_with(chunk(b"tEXt", b"Comment\0" + bytes(2 << 20))))
    data[data.rindex(b"IDAT") + 20] ^= 1
    with pytest.raises(DecodeError):
        decode_image(bytes(data))
    header = bytearray(saved("PNG"))
    header[29] ^= 1  # the checksum of IHDR, on which pixels depend
    with pytest.raises(DecodeError):
        decode_image(bytes(header))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_conversion_in_bands_changes_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (31, 17, 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    data = saved("PNG", image, **{"transparency": b"\x00\x80" * 100} if mode == "P" else {})
    expected = decode_image(data)
    for rows in (1, 4, 30):
        monkeypatch.setattr(decode, "BAND_PIXELS", rows * 17)
        assert_array_equal(decode_image(data), expected)
