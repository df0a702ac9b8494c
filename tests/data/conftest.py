"""Small shards to read from: images of a few pixels, written with Python's own tarfile."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteTar = Callable[..., Path]


def encode(seed: int, *, size: tuple[int, int] = (12, 10), format: str = "JPEG") -> bytes:
    """An image of noise, (width, height) pixels; the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=format)
    return file.getvalue()


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    return encode


@pytest.fixture(scope="session")
def write_tar() -> WriteTar:
    def write(path: Path, members: Mapping[str, bytes], *, format: int = tarfile.USTAR_FORMAT) -> Path:
        with tarfile.open(path, "w", format=format) as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def shards(tmp_path: Path, write_tar: WriteTar) -> Path:
    """20 labelled images in three shards of 7, 5 and 8; sample i has the label i % 4 and the noise of seed i."""
    folder = tmp_path / "shards"
    folder.mkdir()
    first = 0
    for number, count in enumerate((7, 5, 8)):
        members = {}
        for sample in range(first, first + count):
            members[f"{sample:04d}.jpg"] = encode(sample)
            members[f"{sample:04d}.cls"] = str(sample % 4).encode()
        write_tar(folder / f"part-{number:06d}.tar", members)
        first += count
    return folder
