import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from ssl_pipeline.data import decode
from ssl_pipeline.data.decode import DecodeError, decode_image, image_extension

Encoded = Callable[..., bytes]


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


@pytest.mark.parametrize(("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_the_three_formats_decode(encoded: Encoded, format: str, extension: str) -> None:
    data = encoded(0, format=format)
    pixels = decode_image(data)
    assert pixels.shape == (10, 12, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert image_extension(data) == extension


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(encoded: Encoded, format: str) -> None:
    with pytest.raises(DecodeError, match="no JPEG, PNG or WebP image"):
        decode_image(encoded(0, format=format))
    assert image_extension(encoded(0, format=format)) is None


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.9])
def test_a_truncated_file_is_an_error(encoded: Encoded, format: str, kept: float) -> None:
    data = encoded(0, size=(64, 64), format=format)
    with pytest.raises(DecodeError) as error:
        decode_image(data[: int(len(data) * kept)])
    assert "\n" not in str(error.value)


def test_noise_behind_a_true_header_is_an_error_in_one_line(encoded: Encoded) -> None:
    generator = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(0, size=(40, 40), format=format)
        for _ in range(50):
            broken = bytearray(data)
            for position in generator.integers(8, len(data), 20):
                broken[position] = generator.integers(256)
            reason = "decoded all the same"
            try:
                decode_image(bytes(broken))
            except DecodeError as error:
                reason = str(error)
            assert reason
            assert "\n" not in reason


def test_sixteen_bits_are_shifted_not_saturated() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    gray = decode_image(saved(Image.fromarray(values)))
    assert_array_equal(gray[0, :, 0], [0, 0, 1, 128, 255])


def test_transparent_pixels_lie_on_white() -> None:
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    assert_array_equal(decode_image(saved(Image.fromarray(pixels)))[0], [[255, 0, 0], [255, 255, 255], [127] * 3])
    gray = np.array([[[0, 0], [0, 255]]], dtype=np.uint8)
    assert_array_equal(decode_image(saved(Image.fromarray(gray, mode="LA")))[0], [[255] * 3, [0] * 3])


def test_palettes_and_colour_keys_become_rgb() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert_array_equal(decode_image(saved(palette))[0], [[10, 20, 30], [40, 50, 60]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_array_equal(decode_image(saved(palette, transparency=b"\x00\xff"))[0], [[255] * 3, [40, 50, 60]])
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert_array_equal(decode_image(saved(keyed, transparency=(1, 2, 3)))[0], [[255] * 3, [4, 5, 6]])


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_other_colour_models_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (9, 7), "white").convert(mode)
    pixels = decode_image(saved(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert pixels.shape == (7, 9, 3)
    assert pixels.min() >= 253


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # where the first stored pixel is to be shown, and whether rows and columns change places
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }[orientation]
    assert_array_equal(decode_image(saved(Image.fromarray(pixels), exif=exif)), upright)


def test_broken_exif_data_spoil_nothing() -> None:
    image = Image.new("RGB", (4, 3), "red")
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode_image(saved(image, "JPEG", exif=exif)).shape == (3, 4, 3)


def test_the_first_frame_of_an_animation_is_read() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    for format in ("PNG", "WEBP"):
        data = saved(red, format, save_all=True, append_images=[blue], **{"lossless": True} if format == "WEBP" else {})
        assert_array_equal(decode_image(data)[0, 0], [255, 0, 0])


def test_a_huge_size_is_refused_before_decoding() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for width in (10_000, 100_000, 2**31 - 1):
        header = struct.pack(">IIBBBBB", width, 10_000, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(DecodeError, match=f"{width}x10000 pixels are more than the limit of 50,000,000"):
                decode_image(bomb)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_limit_of_pixels_can_be_lowered(encoded: Encoded, format: str) -> None:
    data = encoded(0, format=format)
    assert decode_image(data, max_pixels=120).shape == (10, 12, 3)
    with pytest.raises(DecodeError, match="12x10 pixels are more than the limit of 119"):
        decode_image(data, max_pixels=119)


def test_a_large_webp_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", None)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + (16_382).to_bytes(3, "little") * 2
    with pytest.raises(DecodeError, match="16383x16383 pixels are more than the limit"):
        decode_image(b"RIFF" + struct.pack("<I", len(body)) + body)


def with_scans(count: int, **options: object) -> bytes:
    """A JPEG whose last scan is there `count` times more."""
    data = saved(Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)), "JPEG", **options)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


@pytest.mark.parametrize("fill", [b"", b"\xff"])
def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(fill: bytes) -> None:
    data = with_scans(3000, progressive=True)
    scans = data.count(b"\xff\xda")
    with pytest.raises(DecodeError, match=f"^{scans} scans are more than 100$"):
        decode_image(data[:2] + fill + data[2:])
    assert decode_image(with_scans(0, progressive=True)).shape == (16, 16, 3)


def test_what_looks_like_scans_in_metadata_is_none() -> None:
    data = with_scans(0, progressive=True)
    thumbnails = b"\xff\xe1\xff\xf0" + b"\xff\xda" * (0xFFEE // 2)
    assert decode_image(data[:2] + thumbnails + data[2:]).shape == (16, 16, 3)


def test_transparent_pixels_take_little_more_memory_than_themselves() -> None:
    command = (
        "import io, resource, numpy as np; from PIL import Image; from ssl_pipeline.data.decode import decode_image\n"
        "file = io.BytesIO(); Image.new('RGBA', (4000, 4000)).save(file, 'PNG', compress_level=1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert decode_image(file.getvalue()).shape == (4000, 4000, 3)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    kilobytes = int(subprocess.run([sys.executable, "-c", command], stdout=subprocess.PIPE, check=True).stdout)
    assert kilobytes < 100_000  # the image as saved was 64 MB, decoded it is 64 + 48 MB


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"a text"])
def test_what_is_no_image_is_an_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_image(data)


def test_without_simplejpeg_pixels_and_refusals_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))
    options = [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"restart_marker_blocks": 2}]
    files = [saved(image, "JPEG", **option) for option in options for image in (noise, noise.convert("L"))]
    direct = [decode_image(data) for data in files]
    monkeypatch.setattr(decode, "decode_jpeg", None)
    for data, pixels in zip(files, direct, strict=True):
        assert_array_equal(decode_image(data), pixels)
    with pytest.raises(DecodeError):
        decode_image(files[0][:-40])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("room", [0, 359, 360, 500])
def test_pixels_lie_in_the_buffer_if_they_fit(encoded: Encoded, format: str, room: int) -> None:
    buffer = np.full(room, 7, dtype=np.uint8)
    pixels = decode_image(encoded(0, format=format), buffer)
    assert_array_equal(pixels, decode_image(encoded(0, format=format)))
    assert np.shares_memory(pixels, buffer) == (room >= 360)
    assert (buffer[360 if room >= 360 else 0 :] == 7).all()
