"""Copies of images as they are found in the wild: smaller, encoded again, cut, mirrored. They measure what a search
finds."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_pipeline.data.decode import decode_image
from ssl_pipeline.data.shards.manifest import Manifest, write_manifest
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.packing.candidates import Candidate
from ssl_pipeline.packing.shard_writer import write_shards
from ssl_pipeline.randomness import SPLIT, generate_uniforms, hash64, permutation

SMALLER, KEPT_AREA, QUALITY, LOW_QUALITY = 0.6, 0.9, 90, 40


def _smaller(image: Image.Image, sample: int) -> Image.Image:
    size = [max(round(SMALLER * side), 1) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _cut(image: Image.Image, sample: int) -> Image.Image:
    """A rectangle of 90 % of the area and the same shape, anywhere in the image."""
    width, height = (max(round(KEPT_AREA**0.5 * side), 1) for side in image.size)
    across, down = generate_uniforms(hash64(SPLIT, sample), 2)
    left, top = int(across * (image.width - width + 1)), int(down * (image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


ALTERATIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "resized to 60 %": _smaller,
    "JPEG of quality 40": lambda image, sample: image,
    "90 % cut out": _cut,
    "mirrored": lambda image, sample: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


class CopiesOf:
    """The altered copies of images of shards, as files named `ALTERATION/SAMPLE.jpg`."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def read(self, name: str) -> bytes:
        alteration, _, file = name.partition("/")
        sample = int(file.partition(".")[0])
        image = Image.fromarray(decode_image(self.index.read(sample).image))
        file_bytes = io.BytesIO()
        quality = LOW_QUALITY if "quality" in alteration else QUALITY
        ALTERATIONS[alteration](image, sample).save(file_bytes, "JPEG", quality=quality)
        return file_bytes.getvalue()


def chosen_to_copy(num_images: int, count: int, *, seed: int = 0) -> list[int]:
    """The images that are copied, drawn at random."""
    return np.sort(permutation(num_images, seed, SPLIT)[: min(count, num_images)]).tolist()


def plant(index: ShardIndex, samples: Sequence[int], folder: Path) -> ShardIndex:
    """Shards in `folder` of the altered copies: those of the first alteration in the order of `samples`, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = [(Candidate(f"{name}/{sample}.jpg", None), "jpg") for name in ALTERATIONS for sample in samples]
    shards = write_shards(CopiesOf(index), copies, folder, "copies", samples_per_shard=1000, packing=None)
    write_manifest(folder, Manifest(None, shards, {"source": index.source}))
    return open_shards(folder)
