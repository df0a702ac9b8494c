"""Decode JPEG, PNG and WebP files of any origin, with Pillow (https://pillow.readthedocs.io).

Plain JPEG files go to libjpeg-turbo directly, through simplejpeg (https://pypi.org/project/simplejpeg) where it is
installed. Pillow uses the same library: the pixels are the same, and so is what is refused.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_pipeline.augment.rgb import as_rgb
from ssl_pipeline.data.headers import JpegHeader, image_extension, jpeg_header, stored_size
from ssl_pipeline.data.metadata import orientation_of, without_metadata
from ssl_pipeline.data.shards.tar import TarBytes

try:
    from simplejpeg import decode_jpeg
except ImportError:  # no wheel for this platform: Pillow takes 1.2 to 1.5 times as long, 6 times at 32 pixels
    decode_jpeg = None

__all__ = ["DecodeError", "decode_image", "decode_with_pillow", "decoded_size", "image_extension"]

FORMATS = ("JPEG", "PNG", "WEBP")
NAMES = {"WEBP": "WebP"}  # of formats that Pillow spells differently
MAX_PIXELS = 50_000_000
MAX_SCANS = 100  # of a JPEG; each goes over the whole image, and real ones have about ten
BAND_PIXELS = 1 << 20  # converted at a time
SINGLE_SCAN_FRAMES = {0xC0, 0xC1}  # sequential
PLAIN_FRAMES = {0xC0, 0xC2}  # baseline and progressive, Huffman coded


class DecodeError(ValueError):
    """An image that cannot be decoded: the reason in one line."""


def decode_image(
    data: bytes, out: NDArray[np.uint8] | None = None, *, max_pixels: int | None = None
) -> NDArray[np.uint8]:
    """RGB pixels (H, W, 3) uint8 of the first frame of a JPEG, PNG or WebP file.

    They are written to the start of `out`, a flat array, if that is given and large enough; the result is then a view
    of it, else an array of its own. The size is checked before any pixel is decoded (at most `max_pixels`, or 50
    megapixels), and so is how often a JPEG goes over them (100 scans at most). The orientation that the file states is
    applied, 16-bit gray is shifted to 8 bits, transparent pixels become white. Other metadata, damaged or not, is
    ignored. Raises DecodeError for everything else.
    """
    header = jpeg_header(data, 0, len(data))
    _refuse_costly(data, header, MAX_PIXELS if max_pixels is None else max_pixels)
    orientation = orientation_of(data, 0, len(data), header)
    pixels = _decode_plain_jpeg(data, header, out if orientation == 1 else None)
    if pixels is None:
        limit = MAX_PIXELS if max_pixels is None else max_pixels
        pixels = decode_with_pillow(without_metadata(data), max_pixels=limit)
    elif orientation == 1:
        return pixels
    pixels = upright(pixels, orientation)
    if out is None or out.size < pixels.size:
        return np.ascontiguousarray(pixels)
    placed = out[: pixels.size].reshape(pixels.shape)
    placed[:] = pixels
    return placed


def upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The image turned as EXIF's orientation 1 to 8 says, as a view."""
    turned = pixels_HWC[::-1] if orientation in (3, 4, 6, 7) else pixels_HWC
    turned = turned[:, ::-1] if orientation in (2, 3, 7, 8) else turned
    return turned.swapaxes(0, 1) if orientation >= 5 else turned


def decoded_size(data: TarBytes, start: int = 0, end: int | None = None) -> tuple[int, int]:
    """Height and width of what `decode_image` makes of the file at `data[start:end]`, (0, 0) if it refuses its header.
    Usual files are not decoded for this. One whose pixels are damaged after the header has a size but is refused later.
    """
    end = len(data) if end is None else end
    header = jpeg_header(data, start, end)
    size = stored_size(data, start, end) if header is None else (header.height, header.width)
    if size is None:
        try:
            height, width, _ = decode_image(data[start:end]).shape
        except DecodeError:
            return 0, 0
        return height, width
    height, width = size
    if not 0 < height * width <= MAX_PIXELS:
        return 0, 0
    turned = height != width and orientation_of(data, start, end, header) >= 5
    return (width, height) if turned else (height, width)


def _refuse_costly(data: bytes, header: JpegHeader | None, max_pixels: int) -> None:
    """Raise DecodeError for what the header shows: opening a WebP image takes memory for all of its pixels."""
    size = stored_size(data, 0, len(data)) if header is None else (header.height, header.width)
    if size is not None:
        _refuse_large(*size, max_pixels)
    if header is None:
        first = 0
        if data[:2] != b"\xff\xd8":
            return
    else:
        first = header.scan
        if header.frame in SINGLE_SCAN_FRAMES and data[first + 4 : first + 5] == bytes([header.components]):
            return  # all components in the first scan, which is the only one then
    scans = data.count(b"\xff\xda", first)
    if scans > MAX_SCANS:
        raise DecodeError(f"{scans} scans are more than {MAX_SCANS}")


def _refuse_large(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DecodeError(f"{width}x{height} pixels are more than the limit of {max_pixels:,}")


def _decode_plain_jpeg(
    data: bytes, header: JpegHeader | None, out: NDArray[np.uint8] | None
) -> NDArray[np.uint8] | None:
    """The pixels of a JPEG file that needs nothing but decoding; None where Pillow must look at it."""
    if decode_jpeg is None or header is None or header.frame not in PLAIN_FRAMES:
        return None
    num_pixels = header.height * header.width
    if header.bits != 8 or header.components not in (1, 3):
        return None
    fits = out is not None and out.size >= 3 * num_pixels
    try:
        # strict: what libjpeg would only warn of, a file cut short among them, is an error
        return decode_jpeg(data, "RGB", strict=True, buffer=out if fits else None)
    except ValueError:
        return None


def decode_with_pillow(
    data: bytes, *, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """RGB pixels (H, W, 3) of the first frame of a file of some of Pillow's formats, as stored.

    Raises DecodeError for any other file, and for one that is damaged or larger than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about metadata that no pixel depends on
            with Image.open(io.BytesIO(data), formats=formats) as image:
                _refuse_large(image.height, image.width, max_pixels)
                return _rgb_pixels(image)
    except DecodeError:
        raise
    except Image.UnidentifiedImageError:
        names = [NAMES.get(name, name) for name in formats]
        raise DecodeError(f"no {', '.join(names[:-1])} or {names[-1]} image") from None
    except Exception as error:  # damaged files make Pillow raise a dozen types, SyntaxError and struct.error among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(reason[:200].rstrip(". ")) from None


def _rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Converted in bands, because each conversion makes copies of what it is given."""
    if image.mode == "F":
        raise DecodeError("its pixels are fractional numbers of unknown range")
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    image.load()
    width, height = image.size
    pixels_HWC = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(BAND_PIXELS // width, 1)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels_HWC[top:bottom] = np.asarray(as_rgb(image.crop((0, top, width, bottom))))
    return pixels_HWC
