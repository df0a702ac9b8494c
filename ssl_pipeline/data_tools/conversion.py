"""GIF, BMP and TIFF files become PNG when they are packed: readers of shards know JPEG, PNG and WebP alone."""

from __future__ import annotations

import io

from PIL import Image

from ssl_pipeline.data.decode import decode_with_pillow

CONVERTED_EXTENSIONS = ("bmp", "gif", "tif", "tiff")
FORMATS = ("GIF", "BMP", "TIFF")
STARTS = (b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: files beyond 4 GB


def storable(data: bytes) -> bytes:
    """The file as it can lie in a shard: a GIF, BMP or TIFF as PNG, anything else as it is.

    Of several frames or pages the first, upright, as 8-bit RGB: of 16 bits the higher 8, transparent pixels on white,
    CMYK as Pillow converts it without a profile. Raises DecodeError for what is damaged, has more than MAX_PIXELS, or
    has numbers with fractions for pixels.
    """
    if not data.startswith(STARTS):
        return data
    file = io.BytesIO()
    Image.fromarray(decode_with_pillow(data, formats=FORMATS)).save(file, "PNG")
    return file.getvalue()
