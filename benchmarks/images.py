"""Images to measure with: the user's own, or parts of the two photographs that come with scikit-learn."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.settings import BenchmarkConfig
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import RECIPES, ConfigError, read_recipe
from ssl_pipeline.data.decode import decode_image
from ssl_pipeline.packing.sources import open_source

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SAMPLES_PER_SHARD = 64
PHOTOGRAPH, SMALL = (500, 375), (32, 32)


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

    def write_shards(self, folder: Path) -> Path:
        """The images as labelled WebDataset shards."""
        folder.mkdir(parents=True)
        for start in range(0, len(self.files), SAMPLES_PER_SHARD):
            with webdataset.TarWriter(str(folder / f"part-{start:06d}.tar"), mtime=0) as shard:
                for number, content in enumerate(self.files[start : start + SAMPLES_PER_SHARD], start):
                    shard.write({"__key__": f"{number:06d}", "jpg": content, "cls": 0})
        return folder

    def write_folder(self, folder: Path) -> Path:
        """The images as files of one class folder."""
        (folder / "class").mkdir(parents=True)
        for number, content in enumerate(self.files):
            (folder / "class" / f"{number:06d}.jpg").write_bytes(content)
        return folder

    @contextmanager
    def in_shards(self) -> Iterator[Path]:
        """Shards of the images for as long as they are needed."""
        with TemporaryDirectory() as folder:
            yield self.write_shards(Path(folder) / "shards")


def images_for(config: BenchmarkConfig, count: int, *, small: bool = False) -> Images:
    """`count` photographs of some 500 x 375 pixels, or images of 32 x 32."""
    source, pixels = (config.cifar10, SMALL) if small else (config.imagenet, PHOTOGRAPH)
    return load_images(source, pixels=pixels).spread_out(count)


def load_images(source: Path | None, *, pixels: tuple[int, int], most: int = 512) -> Images:
    """At most `most` images of a folder or zip, or made-up ones of about `pixels` (width, height) if it is None."""
    if source is None:
        return _made_up(pixels)
    files = open_source(str(source))
    names = [name for name in files.names() if name.lower().endswith(SUFFIXES)]
    if not names:
        raise ConfigError(f"'{source}' holds no image. Needed: a folder or a zip of {', '.join(SUFFIXES)}.")
    return Images(source.name, tuple(map(files.read, names[:: max(len(names) // most, 1)][:most])))


@cache
def _made_up(pixels: tuple[int, int]) -> Images:
    """64 parts of two photographs, resized to `pixels` and saved as JPEG at about the size of ImageNet's."""
    generator = np.random.default_rng(0)
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    files = []
    for number in range(64):
        photograph = whole[number % len(whole)]
        width, height = (round(side * generator.uniform(0.6, 1.0)) for side in photograph.size)
        left = int(generator.integers(0, photograph.width - width + 1))
        top = int(generator.integers(0, photograph.height - height + 1))
        part = photograph.resize(pixels, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        file = io.BytesIO()
        part.save(file, format="JPEG", quality=92)
        files.append(file.getvalue())
    return Images("scikit-learn's two photographs", tuple(files))


def views_of(recipe: str) -> dict[str, ViewGroup]:
    """The groups of views that a recipe asks for."""
    groups = read_recipe(recipe, RECIPES)["augment"]
    assert isinstance(groups, dict)
    return {name: ViewGroup.model_validate_json(json.dumps(group)) for name, group in groups.items()}


def total_views(groups: Mapping[str, ViewGroup]) -> str:
    """`2x224 + 8x96`."""
    return " + ".join(f"{group.count}x{group.size}" for group in groups.values())


def decode_and_drop(files: Sequence[bytes]) -> int:
    """The ceiling of any pipeline that decodes as we do."""
    for content in files:
        decode_image(content)
    return 0
