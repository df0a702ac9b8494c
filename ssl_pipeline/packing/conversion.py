"""GIF, BMP, TIFF, AVIF and HEIC become PNG when they are packed: readers of shards know only JPEG, PNG and WebP."""

from __future__ import annotations

import io
from functools import cache
from pathlib import PurePosixPath

from PIL import Image, features

from ssl_pipeline.data.decode import DecodeError, decode_with_pillow, upright
from ssl_pipeline.data.shards.rows import IMAGE_EXTENSIONS

CONVERTED_EXTENSIONS = ("bmp", "gif", "tif", "tiff")
JPEG_BY_OTHER_NAMES = ("jpe", "jfif")
READ = (*IMAGE_EXTENSIONS, *JPEG_BY_OTHER_NAMES, *CONVERTED_EXTENSIONS)
FORMATS = ("GIF", "BMP", "TIFF")
STARTS = (b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: files beyond 4 GB
BRANDS = {  # of ISO base media files, bytes 8 to 12: https://mp4ra.org/registered-types/brands
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIF"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
OPTIONAL = {"heic": "HEIF", "heif": "HEIF", "avif": "AVIF"}
"""Extensions of files that are read where Pillow has a reader for their format."""
ORIENTATION = 0x0112


def extension_of(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; empty without one."""
    return PurePosixPath(name).suffix.lower().lstrip(".")


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name, whether or not its format is read here."""
    return extension_of(name) in (*READ, *OPTIONAL)


@cache
def optional_formats() -> tuple[str, ...]:
    """AVIF where Pillow was built with it, and HEIF (HEIC photographs) where pillow-heif is installed: extra `heif`."""
    found = ("AVIF",) if features.check_module("avif") else ()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return found
    register_heif_opener()
    return (*found, "HEIF")


def is_read(extension: str) -> bool:
    """Whether files of this extension are read here."""
    return OPTIONAL.get(extension) in optional_formats()


def storable(data: bytes) -> bytes:
    """The file as it can lie in a shard: a GIF, BMP, TIFF, AVIF or HEIC as PNG, anything else as it is.

    Of several frames or pages the first, upright, as 8-bit RGB: of 16 bits the higher 8, transparent pixels on white,
    CMYK as Pillow converts it without a profile. Raises DecodeError for what is damaged, has more than MAX_PIXELS, or
    has numbers with fractions for pixels.
    """
    format = BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
    if format in optional_formats():
        pixels = upright(decode_with_pillow(data, formats=optional_formats()), _orientation(data))
    elif data.startswith(STARTS):
        pixels = decode_with_pillow(data, formats=FORMATS)
    else:
        return data
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _orientation(data: bytes) -> int:
    """EXIF's orientation where the reader has left it to us (TIFF's does not), 1 where there is none."""
    try:
        with Image.open(io.BytesIO(data), formats=optional_formats()) as image:
            found = image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # as `decode_with_pillow` finds
        raise DecodeError(" ".join(str(error).split())[:200] or type(error).__name__) from None
    return found if found in range(1, 9) else 1
