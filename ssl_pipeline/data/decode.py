"""Decode JPEG, PNG and WebP files that nobody vouches for, with Pillow (https://pillow.readthedocs.io)."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """An image that cannot be decoded: the reason in one line."""


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """RGB pixels (H, W, 3) uint8 of the first frame of a JPEG, PNG or WebP file.

    The size is checked before any pixel is decoded (at most 50 megapixels). The EXIF orientation is applied, 16-bit
    gray is shifted to 8 bits, transparent pixels lie on white. Raises DecodeError for everything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about metadata that no pixel depends on
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DecodeError(f"{width}x{height} pixels are more than {MAX_PIXELS // 10**6} megapixels")
                plain = image.mode == "RGB" and not image.info.keys() & {"exif", "transparency"}
                return np.array(image if plain else _upright(image, _as_rgb(image)))
    except DecodeError:
        raise
    except Image.UnidentifiedImageError:
        raise DecodeError("no JPEG, PNG or WebP image") from None
    except Exception as error:  # damaged files make Pillow raise a dozen types, SyntaxError and struct.error among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(reason[:200]) from None


def image_extension(data: bytes) -> str | None:
    """jpg, png or webp by the first bytes of a file, whatever it is called; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel; `convert` would saturate
        high_byte = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8
        image = Image.fromarray(high_byte.astype(np.uint8))
    elif image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(transparent, mask=transparent.getchannel("A"))
    return image.convert("RGB")


def _upright(source: Image.Image, image: Image.Image) -> Image.Image:
    """`image` turned as the EXIF data of `source` say; unreadable EXIF data turn nothing."""
    if "exif" not in source.info:
        return image
    try:
        orientation = source.getexif().get(ORIENTATION, 1)
    except Exception:  # as above: any type at all, and the pixels are fine
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image
