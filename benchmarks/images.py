"""Images to measure with: the user's own, or parts of the two photographs that come with scikit-learn."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import RECIPES, ConfigError, read_recipe

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SAMPLES_PER_SHARD = 64


@dataclass(frozen=True)
class Images:
    """Encoded images and where they come from."""

    source: str
    files: tuple[bytes, ...]

    def spread_out(self, count: int) -> Images:
        """`count` of the images at equal distances, from the start again where there are fewer."""
        picked = [self.files[number * max(len(self.files) // count, 1) % len(self.files)] for number in range(count)]
        kilobytes = sum(map(len, picked)) / len(picked) / 1000
        return Images(f"{count} images of {kilobytes:.3g} kB from {self.source}", tuple(picked))


def load_images(source: Path | None, *, pixels: tuple[int, int], most: int = 512) -> Images:
    """At most `most` images of a folder or zip, or made-up ones of about `pixels` (width, height) if it is None."""
    if source is None:
        return _made_up(pixels)
    if not source.exists():
        raise ConfigError(f"'{source}' does not exist. Needed: a folder or a zip of images.")
    files = tuple(_read(source, most))
    if not files:
        raise ConfigError(f"'{source}' holds no image. Needed: a folder or a zip of {', '.join(SUFFIXES)}.")
    return Images(source.name, files)


def views_of(recipe: str) -> dict[str, ViewGroup]:
    """The groups of views that a recipe asks for."""
    groups = read_recipe(recipe, RECIPES)["augment"]
    assert isinstance(groups, dict)
    return {name: ViewGroup.model_validate_json(json.dumps(group)) for name, group in groups.items()}


def write_shards(images: Images, folder: Path) -> Path:
    """The images as labelled WebDataset shards."""
    folder.mkdir(parents=True)
    for start in range(0, len(images.files), SAMPLES_PER_SHARD):
        with tarfile.open(folder / f"part-{start:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, content in enumerate(images.files[start : start + SAMPLES_PER_SHARD], start):
                for name, data in ((f"{number:06d}.jpg", content), (f"{number:06d}.cls", b"0")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return folder


def write_folder(images: Images, folder: Path) -> Path:
    """The images as files of one class folder."""
    (folder / "class").mkdir(parents=True)
    for number, content in enumerate(images.files):
        (folder / "class" / f"{number:06d}.jpg").write_bytes(content)
    return folder


def _read(source: Path, most: int) -> Iterator[bytes]:
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        yield from (path.read_bytes() for path in paths[:: max(len(paths) // most, 1)][:most])
        return
    with zipfile.ZipFile(source) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith(SUFFIXES))
        yield from (archive.read(name) for name in names[:: max(len(names) // most, 1)][:most])


@cache
def _made_up(pixels: tuple[int, int]) -> Images:
    """64 parts of two photographs, resized to `pixels` and saved as JPEG at about the size of ImageNet's."""
    generator = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    files = []
    for number in range(64):
        photograph = photographs[number % len(photographs)]
        width, height = (round(side * generator.uniform(0.6, 1.0)) for side in photograph.size)
        left, top = (
            int(generator.integers(0, side - part + 1))
            for side, part in zip(photograph.size, (width, height), strict=True)
        )
        part = photograph.resize(pixels, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        file = io.BytesIO()
        part.save(file, format="JPEG", quality=92)
        files.append(file.getvalue())
    return Images("scikit-learn's two photographs", tuple(files))


def total_views(groups: Mapping[str, ViewGroup]) -> str:
    """`2x224 + 8x96`."""
    return " + ".join(f"{group.count}x{group.size}" for group in groups.values())
