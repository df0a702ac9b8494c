"""What patch features of images with masks are worth: a linear head on them, and their nearest neighbours.

The linear head is DINOv2's (Oquab et al., 2023, section 7.4, https://arxiv.org/abs/2304.07193): one linear layer on
normalised patch tokens, its scores interpolated to the size of the image. The neighbours are those of Balazevic et al.
(2023, https://arxiv.org/abs/2306.01667): each patch takes the classes of the most similar training patches, weighted by
the softmax of their cosines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import BatchSize, ConfigError, PlaceText, Seed
from ssl_pipeline.eval.dense_images import DenseImages, Mask, class_names, open_dense
from ssl_pipeline.eval.labelled import say
from ssl_pipeline.eval.measures import Found, Measure
from ssl_pipeline.eval.protocol import ReportConfig
from ssl_pipeline.eval.search.neighbours import nearest_neighbours, require_finite
from ssl_pipeline.eval.segmentation import (
    NOT_COUNTED,
    Overlaps,
    cross_entropy,
    neighbour_classes,
    overlap,
    overlap_scores,
    overlaps_of,
    patch_classes,
    segment,
    train_heads,
)
from ssl_pipeline.files import JSON
from ssl_pipeline.randomness import SPLIT, permutation

SEARCHED_TOGETHER = 4096  # patches of test images whose classes are predicted at once

# Axes: I images, L patches of each, P patches of training images, Q of test images, D dimensions, C classes.

ScoresOf = Callable[[Tensor], Tensor]
"""Features (Q, D) of patches -> scores (Q, C) of their classes."""


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
    """At most so many training patches, drawn by `seed`."""
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
        {int(number) for sample in range(len(images)) for number in np.unique(images.mask(sample))} - set(config.ignore)
        for images in (train, test)
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
class TrainingPatches:
    """Features (P, D) of patches, the share of each class among their pixels (P, C), and the image (P,) of each."""

    features: Tensor
    shares: Tensor
    image: Tensor


def training_patches(train_ILD: Tensor, sets: DenseSets, grid: tuple[int, int], config: DenseConfig) -> TrainingPatches:
    """At most `config.patches` patches with counted pixels, as if drawn from a hat, in their order."""
    shares_PC = torch.cat(
        [patch_classes(sets.mask(sets.train, sample), grid, len(sets.numbers)) for sample in range(len(sets.train))]
    )
    counted_P = shares_PC.any(dim=1).nonzero().flatten()
    drawn_P = torch.from_numpy(permutation(len(counted_P), config.seed, SPLIT)[: config.patches]).sort().values
    chosen_P = counted_P[drawn_P]
    features_PD = train_ILD.flatten(0, 1)[chosen_P].float()
    require_finite(features_PD, features_PD[:1])
    return TrainingPatches(features_PD, shares_PC[chosen_P], chosen_P // train_ILD.shape[1])


def linear_head(patches: TrainingPatches, config: DenseConfig) -> tuple[ScoresOf, dict[str, JSON]]:
    """The head with the rate that is best on held-out images, trained again on all; and what was chosen."""
    mean_D, std_D = patches.features.mean(dim=0), patches.features.std(dim=0).clamp(min=1e-6)
    features_PD = (patches.features - mean_D) / std_D
    images = patches.image.unique()
    held_out = images[permutation(len(images), config.seed, SPLIT)[: round(config.validation_fraction * len(images))]]
    held_P = torch.isin(patches.image, held_out)
    if held_P.all() or not held_P.any():
        raise ConfigError(
            f"The linear head chooses its rate on {100 * config.validation_fraction:g} % of the training images. Of "
            f"{len(images)} none is left on one side; take more images, or another validation_fraction."
        )
    settings = {"epochs": config.epochs, "batch_size": config.sgd_batch_size, "seed": config.seed}
    weights, biases = train_heads(
        features_PD[~held_P], patches.shares[~held_P], learning_rates=config.learning_rates, **settings
    )
    losses = [
        cross_entropy(features_PD[held_P] @ weight + bias, patches.shares[held_P])
        for weight, bias in zip(weights, biases, strict=True)
    ]
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[best] == float("inf"):
        raise ConfigError(f"Every rate of the linear head diverged ({len(losses)} tried). Try smaller learning_rates.")
    rate = config.learning_rates[best]
    (weight,), (bias,) = train_heads(features_PD, patches.shares, learning_rates=(rate,), **settings)
    tried = [
        {"learning_rate": tried, "validation_loss": loss}
        for tried, loss in zip(config.learning_rates, losses, strict=True)
    ]
    return lambda features_QD: ((features_QD - mean_D) / std_D) @ weight + bias, {
        "chosen": {"learning_rate": rate},
        "sweep": tried,
    }


def neighbour_head(patches: TrainingPatches, config: DenseConfig) -> tuple[ScoresOf, dict[str, JSON]]:
    """The classes of the most similar training patches; and how many there are."""
    if config.k > len(patches.features):
        raise ConfigError(f"k={config.k} must be at most the number of training patches, {len(patches.features):,}.")
    bank_PD = normalize(patches.features, dim=1)

    def scores_of(features_QD: Tensor) -> Tensor:
        similarities_QK, nearest_QK = nearest_neighbours(bank_PD, normalize(features_QD, dim=1), k=config.k)
        return neighbour_classes(similarities_QK, patches.shares[nearest_QK], temperature=config.temperature)

    return scores_of, {"bank": len(bank_PD)}


HEADS = {"linear": linear_head, "knn": neighbour_head}


def measure_dense(
    train_ILD: Tensor, test_ILD: Tensor, sets: DenseSets, grid: tuple[int, int], config: DenseConfig
) -> Found:
    """Both heads on the features of the patches of training and test images."""
    patches = training_patches(train_ILD, sets, grid, config)
    heads = {name: HEADS[name](patches, config) for name in config.heads}
    found: dict[str, list[Mask]] = {name: [] for name in heads}
    together = max(1, SEARCHED_TOGETHER // test_ILD.shape[1])
    for first in range(0, len(test_ILD), together):
        features_ILD = test_ILD[first : first + together].float()
        require_finite(features_ILD.flatten(0, 1), features_ILD.flatten(0, 1)[:1])
        masks = [sets.mask(sets.test, first + place) for place in range(len(features_ILD))]
        for name, (scores_of, _) in heads.items():
            scores_ILC = scores_of(features_ILD.flatten(0, 1)).unflatten(0, features_ILD.shape[:2])
            for scores_LC, mask_HW in zip(scores_ILC, masks, strict=True):
                predicted_HW = segment(scores_LC, grid, mask_HW.shape)
                found[name].append(overlap(predicted_HW, mask_HW, len(sets.numbers)))
    titles, measures, details = {"linear": "linear", "knn": f"k-NN, k={config.k}"}, [], {}
    for name, (_, about) in heads.items():
        overlaps = overlaps_of(found[name])
        for score, (value, interval) in overlap_scores(overlaps).items():
            called = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}[score]
            measures.append(Measure(f"{score}_{name}", f"{called}, {titles[name]}", value, interval=interval))
        details[name] = {"iou_by_class": _by_class(overlaps, sets.names), **about}
    return Found(tuple(measures), details)


def _by_class(overlaps: Overlaps, names: tuple[str, ...]) -> list[JSON]:
    ious_C, pixels_C = overlaps.class_ious(), overlaps.of_class.sum(dim=0)
    return [
        {"class": name, "pixels": int(pixels), "iou": None if iou.isnan() else iou.item()}
        for name, pixels, iou in zip(names, pixels_C, ious_C, strict=True)
    ]
