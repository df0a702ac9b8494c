"""Images of any mode as RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image


def as_rgb(image: Image.Image) -> Image.Image:
    """16-bit gray is shifted to 8 bits, transparent pixels lie on white."""
    if image.mode.startswith("I"):  # 16 bits per pixel; `convert` would saturate
        high_byte = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8
        image = Image.fromarray(high_byte.astype(np.uint8))
    elif image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(transparent, mask=transparent.getchannel("A"))
    return image.convert("RGB")
