"""Sizes from the heads of files: those of what is decoded, for whatever file it is."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ssl_pipeline.data import decode
from ssl_pipeline.data.decode import DecodeError, decode_image, decoded_size
from ssl_pipeline.data.headers import stored_size
from ssl_pipeline.data.metadata import orientation_of, without_metadata

XMP = '<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>'
MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "P", "RGBA", "LA", "1", "I;16"), "WEBP": ("RGB", "RGBA")}


def saved(mode: str = "RGB", format: str = "JPEG", *, size: tuple[int, int] = (12, 7), **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif_of(orientation: int | None, *, maker: bool = True) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    if maker:
        exif[0x010F], exif[0x0131] = "a camera of some length", "x"
    return exif.tobytes()


def png_with(chunk: bytes, content: bytes, *, before: bytes, mode: str = "RGB") -> bytes:
    data = saved(mode, "PNG")
    place = data.rindex(before) - 4
    added = struct.pack(">I", len(content)) + chunk + content + struct.pack(">I", zlib.crc32(chunk + content))
    return data[:place] + added + data[place:]


def usual_files() -> list[bytes]:
    files = [saved(mode, format) for format, modes in MODES.items() for mode in modes]
    for orientation in (None, *range(10)):
        for format in MODES:
            files += [saved("RGB", format, exif=exif_of(orientation, maker=maker)) for maker in (False, True)]
        files.append(saved("RGBA", "PNG", exif=exif_of(orientation)))
    files += [saved(progressive=True), saved("RGB", "WEBP", lossless=True), saved(xmp=XMP.encode())]
    frame = Image.new("RGB", (12, 7))
    return files + [saved("RGB", format, save_all=True, append_images=[frame]) for format in ("PNG", "WEBP", "MPO")]


def unusual_files() -> list[bytes]:
    """Turned by what stands in an XMP packet, or behind the pixels; two that must be decoded for their size."""
    packet = PngImagePlugin.PngInfo()
    packet.add_itxt("XML:com.adobe.xmp", XMP)
    turning = exif_of(6).removeprefix(b"Exif\0\0")
    return [
        saved(exif=exif_of(None), xmp=XMP.encode()),
        saved("RGB", "WEBP", exif=exif_of(None), xmp=XMP.encode()),
        saved("RGB", "PNG", exif=exif_of(None), pnginfo=packet),
        *(png_with(b"eXIf", turning, before=b"IEND", mode=mode) for mode in ("RGB", "RGBA", "L")),
        png_with(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 8, 2, 0, 0, 0), before=b"IDAT"),
        saved()[:2] + b"\xff" + saved()[2:],  # a fill byte between two segments
    ]


def outcome(data: bytes) -> tuple[int, int] | None:
    try:
        return decode_image(data).shape[:2]
    except DecodeError:
        return None


def test_usual_files_are_not_decoded_for_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    files = usual_files()
    expected = [outcome(data) for data in files]
    assert set(expected) == {(7, 12), (12, 7)}
    monkeypatch.setattr(decode, "decode_image", None)
    assert [decoded_size(data) for data in files] == expected


def test_the_size_of_an_unusual_file_is_that_of_its_pixels() -> None:
    for data in unusual_files():
        assert decoded_size(data) == (outcome(data) or (0, 0))
    assert [stored_size(data, 0, len(data)) for data in unusual_files()].count(None) == 2


def test_a_file_is_read_within_its_bounds() -> None:
    for data in usual_files():
        around = b"\xff\xd8\xff" + data + b"\0\0\0\x20eXIfEXIF"
        assert stored_size(around, 3, 3 + len(data)) == stored_size(data, 0, len(data))
    for data in usual_files()[:12]:
        for end in range(len(data)):
            assert stored_size(data, 0, end) == stored_size(data[:end], 0, end)


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8X", b"?" * 99]
)
def test_what_is_no_image_has_no_size(data: bytes) -> None:
    assert decoded_size(data) == (0, 0)


def test_a_size_of_nothing_or_too_much_is_none() -> None:
    for width, height in ((0, 5), (5, 0), (10_000, 5_001)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        assert decoded_size(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 13, b"IHDR") + header + bytes(4)) == (0, 0)


def with_png_checksums(data: bytearray) -> bytearray:
    """So that a damaged chunk is not refused for its checksum alone."""
    position = 8
    while data[:4] == b"\x89PNG" and position + 12 + (length := int.from_bytes(data[position : position + 4])) <= len(
        data
    ):
        end = position + 8 + length
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return data


def test_damaged_files_have_the_size_of_what_is_decoded_if_anything_is() -> None:
    generator = np.random.default_rng(0)
    files = usual_files() + unusual_files()
    decoded = refused = 0
    for _ in range(1500):
        data = bytearray(files[generator.integers(len(files))])
        for _ in range(generator.integers(1, 4)):
            place = int(generator.integers(min(len(data), int(generator.choice([40, 200, 10_000])))))
            if generator.random() < 0.6:
                data[place] = generator.choice([0, 1, 2, 3, 6, 8, 254, 255, generator.integers(256)])
            elif generator.random() < 0.5:
                data[place:place] = generator.bytes(2)
            else:
                del data[place : place + 2]
        damaged = bytes(with_png_checksums(data))
        found = outcome(damaged)
        assert found is None or decoded_size(damaged) == found
        decoded += found is not None
        refused += found is None
    assert decoded > 200
    assert refused > 200


def test_random_bytes_never_raise() -> None:
    generator = np.random.default_rng(1)
    exif = b"\xff\xd8\xff\xc0\0\x0b\x08\0\x05\0\x03\x01\1\x11\0\xff\xe1\0\x50Exif\0\0II*\0\x08\0\0\0"
    scan = b"\xff\xda\0\x08"
    heads = [data[:length] for data in usual_files() for length in (4, 12, 30)]
    for number in range(3000):
        noise = generator.bytes(200)
        data = heads[number % len(heads)] + noise
        stored_size(data, 0, len(data))
        assert 1 <= orientation_of(data, 0, len(data)) <= 8
        without_metadata(data)
        directory = bytes([number % 4, 0]) + (b"\x12\1\3\0\1\0\0\0" if number % 2 else b"") + noise
        data = exif + directory[: 0x50 - 16] + scan
        assert 1 <= orientation_of(data, 0, len(data)) <= 8
