"""Folders of small images to make shards from."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=format)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten cats (JPEG), seven dogs (PNG), five owls (WebP) in class folders below train/, and one text file."""
    root = tmp_path / "images"
    number = 0
    for name, format, count in (("cat", "JPEG", 10), ("dog", "PNG", 7), ("owl", "WEBP", 5)):
        (root / "train" / name).mkdir(parents=True)
        for _ in range(count):
            (root / "train" / name / f"{number:02d}.{format}").write_bytes(picture(number, format))
            number += 1
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    return root
