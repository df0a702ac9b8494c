"""The pictures of a page as one image for each of some sections, for other viewers (TensorBoard)."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SECTIONS = {"views": "views", "nearest-neighbours": "neighbours", "reconstructions": "reconstructions"}
SIDE, GAP = 64, 4  # pixels of a picture, and between two
WHITE = 255


def sheets(html: str) -> dict[str, NDArray[np.uint8]]:
    """(H, W, 3) for each section of a page that has rows of pictures, a row below the other."""
    found = {}
    for anchor, name in SECTIONS.items():
        section = re.search(f'<section id="{anchor}">(.*?)</section>', html, flags=re.S)
        rows = re.findall('<div class="pictures[^"]*">(.*?)</div>', section.group(1), flags=re.S) if section else []
        pictures = [re.findall('src="data:image/[a-z]+;base64,([^"]+)"', row) for row in rows]
        if pictures:
            found[name] = _sheet(pictures)
    return found


def _sheet(rows: list[list[str]]) -> NDArray[np.uint8]:
    step = SIDE + GAP
    sheet = np.full((len(rows) * step, max(map(len, rows)) * step, 3), WHITE, dtype=np.uint8)
    for row, pictures in enumerate(rows):
        for column, encoded in enumerate(pictures):
            picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB").resize((SIDE, SIDE))
            sheet[row * step : row * step + SIDE, column * step : column * step + SIDE] = np.asarray(picture)
    return sheet
