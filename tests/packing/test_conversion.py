"""GIF, BMP and TIFF in a folder of photographs: what stands in the shards of them."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from ssl_pipeline.data import decode
from ssl_pipeline.data.decode import DecodeError, decode_image, image_extension
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.packing import conversion
from ssl_pipeline.packing.candidates import find_candidates
from ssl_pipeline.packing.conversion import storable
from ssl_pipeline.packing.make_shards import MakeShards, make_shards
from ssl_pipeline.packing.packed_once import look_at
from ssl_pipeline.packing.sources import open_source


def noise(mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    return Image.fromarray(pixels[..., :3] if mode != "RGBA" else pixels).convert(mode)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def tiff(pixels_HWC: np.ndarray, *, photometric: int = 2) -> bytes:
    """An uncompressed TIFF of integers, which Pillow cannot write for more than one channel of 16 bits."""
    height, width, channels = pixels_HWC.shape
    content = pixels_HWC.astype(pixels_HWC.dtype.newbyteorder("<")).tobytes()
    bits = struct.pack(f"<{channels}H", *[8 * pixels_HWC.itemsize] * channels)
    after = 8 + 2 + 9 * 12 + 4
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, after),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, after + len(bits)),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(content)),
    ]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + bits + content


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("GIF", "P", {}),
        ("GIF", "L", {}),
        ("BMP", "RGB", {}),
        ("BMP", "P", {}),
        ("BMP", "1", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "RGB", {"compression": "tiff_deflate"}),
        ("TIFF", "YCbCr", {}),
        ("TIFF", "1", {"compression": "group4"}),
    ],
)
def test_pixels_are_those_that_pillow_sees(format, mode, options):
    data = saved(noise(mode), format, **options)
    stored = storable(data)
    assert image_extension(stored) == "png"
    assert_array_equal(decode_image(stored), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_what_shards_hold_anyway_stays_byte_for_byte(format):
    data = saved(noise(), format)
    assert storable(data) is data
    assert storable(b"no image") == b"no image"


def test_the_first_frame_is_taken():
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    for format in ("GIF", "TIFF"):
        data = saved(red, format, save_all=True, append_images=[blue])
        assert_array_equal(decode_image(storable(data))[0, 0], [255, 0, 0])


def test_transparent_pixels_lie_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    for format in ("GIF", "TIFF"):
        assert_array_equal(decode_image(storable(saved(image, format)))[0], [[255, 0, 0], [255, 255, 255]])


def test_of_sixteen_bits_the_higher_eight_are_taken():
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    gray = decode_image(storable(saved(Image.fromarray(values), "TIFF")))
    assert_array_equal(gray[0, :, 0], [0, 0, 1, 128, 255])
    colours = np.random.default_rng(1).integers(0, 2**16, (5, 6, 3), dtype=np.uint16)
    assert_array_equal(decode_image(storable(tiff(colours))), (colours >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_orientation_is_applied(orientation):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {1: pixels, 3: pixels[::-1, ::-1], 6: pixels[::-1].swapaxes(0, 1), 8: pixels.swapaxes(0, 1)[::-1]}
    assert_array_equal(decode_image(storable(saved(Image.fromarray(pixels), "TIFF", exif=exif))), turned[orientation])


def test_numbers_with_fractions_are_refused():
    with pytest.raises(DecodeError, match="fractional numbers"):
        storable(saved(Image.fromarray(np.ones((3, 3), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_damage_is_a_reason_in_one_line(format):
    data = saved(noise(size=(64, 64)), format)
    for kept in (0.02, 0.5, 0.9):
        with pytest.raises(DecodeError) as error:
            storable(data[: int(len(data) * kept)])
        assert "\n" not in str(error.value)


def test_a_text_that_begins_like_an_image_is_none():
    with pytest.raises(DecodeError):
        storable(b"BM is how this text begins")
    with pytest.raises(DecodeError, match="no GIF, BMP or TIFF image"):
        storable(b"MM\0*" + bytes(3))


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_a_huge_size_is_refused_before_decoding(format, monkeypatch):
    monkeypatch.setattr(decode, "_rgb_pixels", None)
    side = 10_000
    gif = struct.pack("<HHBBB", side, side, 0, 0, 0), b",", struct.pack("<HHHHB", 0, 0, side, side, 0)
    bmp = struct.pack("<IHHI", 54, 0, 0, 54), struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, *[0] * 6)
    huge = {
        "GIF": b"GIF89a" + b"".join(gif),
        "BMP": b"BM" + b"".join(bmp),
        "TIFF": tiff(np.zeros((1, 10_000, 3), dtype=np.uint8)).replace(
            struct.pack("<HHII", 257, 4, 1, 1), struct.pack("<HHII", 257, 4, 1, 10_000)
        ),
    }  # fmt: skip
    with pytest.raises(DecodeError, match="10000x10000 pixels are more than the limit of 50,000,000"):
        storable(huge[format] + bytes(100))


def test_a_folder_of_them_becomes_shards(tmp_path: Path, capsys):
    (tmp_path / "photos").mkdir()
    for format in ("GIF", "BMP", "TIFF", "JPEG"):
        noise(size=(40, 30)).save(tmp_path / "photos" / f"a.{format.lower()}")
    noise(size=(40, 30)).save(tmp_path / "photos" / "b.TIF", format="TIFF")
    (tmp_path / "photos" / "c.gif").write_bytes(b"GIF89a")
    assert look_at(open_source(str(tmp_path / "photos"), "", None)) == (6, 30)
    make_shards(MakeShards(source=str(tmp_path / "photos"), output=tmp_path / "out", workers=1))
    index = open_shards(tmp_path / "out")
    assert (len(index), index.sizes().tolist()) == (5, [[30, 40]] * 5)
    stored = {index.origin(number): image_extension(index.read(number).image) for number in range(5)}
    assert stored == {"a.gif": "png", "a.bmp": "png", "a.tiff": "png", "b.TIF": "png", "a.jpeg": "jpg"}
    assert "1 files left out" in capsys.readouterr().out
    make_shards(MakeShards(source=str(tmp_path / "photos"), output=tmp_path / "small", short_side=16, workers=1))
    assert open_shards(tmp_path / "small").sizes().min() == 16


def readable(format: str) -> None:
    if format not in conversion.optional_formats():
        pytest.skip(f"needs a reader of {format}: pillow-heif, or a Pillow built with it")


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_photographs_of_phones_become_png(format):
    readable(format)
    image = Image.new("RGB", (24, 16), (200, 30, 30))
    image.paste((20, 40, 220), (0, 0, 12, 16))
    stored = storable(saved(image, format, quality=95))
    assert image_extension(stored) == "png"
    pixels = decode_image(stored)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 6


def test_their_orientation_is_applied():
    readable("AVIF")
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (24, 16), "red")
    image.paste("blue", (0, 0, 12, 16))
    pixels = decode_image(storable(saved(image, "AVIF", exif=exif)))
    assert pixels.shape == (24, 16, 3)
    assert pixels[2, 8, 2] > 200  # the left half is the upper one
    assert pixels[-3, 8, 0] > 200


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_a_damaged_photograph_of_a_phone_is_left_out(format):
    readable(format)
    data = saved(noise(size=(64, 64)), format)
    with pytest.raises(DecodeError) as error:
        storable(data[: len(data) // 2])
    assert "\n" not in str(error.value)


def test_without_a_reader_they_are_counted_with_what_brings_it(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "optional_formats", lambda: ())
    (tmp_path / "a.heic").write_bytes(bytes(4) + b"ftypheic" + bytes(20))
    noise().save(tmp_path / "b.png")
    found = find_candidates(open_source(str(tmp_path), "", None))
    assert [image.name for image in found.images] == ["b.png"]
    (rejected,) = found.others
    assert rejected.reason == "not read here: .heic; pip install 'ssl-pipeline[heif]' brings the reader"
    data = (tmp_path / "a.heic").read_bytes()
    assert storable(data) is data
