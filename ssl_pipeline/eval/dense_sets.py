"""What segmentation is measured on: settings, both sets of images and masks, and the patches that heads learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config import BatchSize, ConfigError, PlaceText, Seed
from ssl_pipeline.eval.dense_images import DenseImages, Mask, class_names, open_dense
from ssl_pipeline.eval.labelled import say
from ssl_pipeline.eval.progress import counted
from ssl_pipeline.eval.protocol import ReportConfig
from ssl_pipeline.eval.segmentation import NOT_COUNTED, patch_classes
from ssl_pipeline.randomness import SPLIT, permutation

# Axes: P patches that are learnt from, C classes.


class DenseConfig(ReportConfig):
    """Segmentation of images with masks by linear heads and nearest neighbours of a backbone's patch tokens."""

    source: PlaceText
    """A folder or zip with images and masks of the same names; a mask is a PNG with the class of each pixel."""
    images: str = "images"
    """Its folder of images."""
    masks: str = "masks"
    """Its folder of masks."""
    train: str = "train.txt"
    """The images that heads learn from and neighbours are: a file of the source with a name in each line, or a folder
    in both `images` and `masks`."""
    test: str = "test.txt"
    """The images that are measured, likewise."""
    ignore: tuple[Annotated[int, Field(ge=0, le=65535)], ...] = (255,)
    """Classes whose pixels are neither learnt nor measured."""
    heads: tuple[Literal["linear", "knn"], ...] = Field(("linear", "knn"), min_length=1)
    """What is measured."""
    patches: Annotated[int, Field(gt=0, le=10**8)] = 200_000
    """At most this many training patches, drawn by `seed`."""
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.003, 0.01, 0.03, 0.1, 0.3), min_length=1)
    """`linear`: rates that are tried on standardised features, all trained at once; one is chosen on held-out training
    images, and trained again on all."""
    epochs: Annotated[int, Field(gt=0, le=10**5)] = 20
    """`linear`: passes over the training patches."""
    sgd_batch_size: BatchSize = 1024
    """`linear`: patches per step."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """`linear`: share of the training images that the rate is chosen on."""
    k: Annotated[int, Field(gt=0)] = 30
    """`knn`: neighbours of each patch."""
    temperature: Annotated[float, Field(gt=0)] = 0.02
    """`knn`: neighbours weigh exp(cosine / temperature)."""
    seed: Seed = 0
    """Seed of the choice of patches, of the held-out images and of the order of batches."""


@dataclass(frozen=True)
class DenseSets:
    """Both sets and their classes: `numbers` are those of the masks, in the order in which classes are counted."""

    train: DenseImages
    test: DenseImages
    numbers: tuple[int, ...]
    names: tuple[str, ...]

    def mask(self, images: DenseImages, sample: int) -> Mask:
        """The class of each pixel (H, W), NOT_COUNTED where it is ignored."""
        pixels = images.mask(sample)
        places = np.full(int(pixels.max()) + 1, NOT_COUNTED, dtype=np.int64)
        known = [number for number in self.numbers if number < len(places)]
        places[known] = np.arange(len(known))
        return places[pixels]


def open_sets(config: DenseConfig) -> DenseSets:
    """Both sets, after a look at every mask; ConfigError or DataError for what cannot be measured."""
    train, test = (
        open_dense(config.source, config.images, config.masks, split) for split in (config.train, config.test)
    )
    seen = [
        {
            int(number)
            for sample in counted(range(len(images)), f"looking at masks, {name}", unit="mask")
            for number in np.unique(images.mask(sample))
        }
        - set(config.ignore)
        for name, images in ((config.train, train), (config.test, test))
    ]
    if len(seen[0]) < 2 or not seen[1]:
        raise ConfigError(
            f"Segmentation needs two classes or more in the masks of train={config.train} and one in those of "
            f"test={config.test}. Without ignore={','.join(map(str, config.ignore))} they have {len(seen[0])} and "
            f"{len(seen[1])}."
        )
    numbers, called = tuple(sorted(seen[0] | seen[1])), class_names(config.source)
    names = tuple(called[number] if number < len(called) else str(number) for number in numbers)
    if unseen := [name for number, name in zip(numbers, names, strict=True) if number not in seen[0]]:
        say([f"No mask of train={config.train} has the class {', '.join(unseen[:5])}: its pixels count as wrong."])
    return DenseSets(train, test, numbers, names)


@dataclass(frozen=True)
class ChosenPatches:
    """Patches of the training images that heads learn from.

    place: their numbers (P,) among the patches of all training images, one image after the other. shares: of each class
    among the pixels of each (P, C). held_out: whether each (P,) is of an image that the rate of the linear head is
    chosen on.
    """

    place: Tensor
    shares: Tensor
    held_out: Tensor


def choose_patches(sets: DenseSets, grid: tuple[int, int], config: DenseConfig) -> ChosenPatches:
    """At most `config.patches` patches with counted pixels, drawn at random; ConfigError if they are too few."""
    shares_PC = torch.cat(
        [
            patch_classes(sets.mask(sets.train, sample), grid, len(sets.numbers))
            for sample in counted(range(len(sets.train)), "classes of patches", unit="mask")
        ]
    )
    counted_P = shares_PC.any(dim=1).nonzero().flatten()
    drawn_P = torch.from_numpy(permutation(len(counted_P), config.seed, SPLIT)[: config.patches]).sort().values
    place_P = counted_P[drawn_P]
    image_P = place_P // (grid[0] * grid[1])
    images = image_P.unique()
    held_out = images[permutation(len(images), config.seed, SPLIT)[: round(config.validation_fraction * len(images))]]
    if "linear" in config.heads and not 0 < len(held_out) < len(images):
        raise ConfigError(
            f"The linear head chooses its rate on {100 * config.validation_fraction:g} % of the training images. Of "
            f"{len(images)} none is left on one side; take more images, or another validation_fraction."
        )
    if "knn" in config.heads and config.k > len(place_P):
        raise ConfigError(f"k={config.k} must be at most the number of training patches, {len(place_P):,}.")
    return ChosenPatches(place_P, shares_PC[place_P], torch.isin(image_P, held_out))
