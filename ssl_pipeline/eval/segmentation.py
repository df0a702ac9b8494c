"""Segments from patch features: the targets of patches, linear heads and neighbours that predict them, how well they
do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ssl_pipeline.eval.intervals import RESAMPLES, or_of_a_share, percentiles
from ssl_pipeline.eval.progress import counted

NOT_COUNTED = -1  # the class of a pixel that is left out

# Axes: I images, P patches of all images, L = R * S patches of one, D dimensions, C classes, K neighbours, T settings.


def patch_classes(mask_HW: NDArray[np.int64], grid: tuple[int, int], num_classes: int) -> Tensor:
    """The share of each class (L, C) among all pixels of each patch, row by row; pixels that are not counted in none.

    A pixel belongs to the patch that its centre lies in when the image is stretched to the patches' grid.
    """
    (height, width), (rows, columns) = mask_HW.shape, grid
    row_H = ((np.arange(height) + 0.5) * rows / height).astype(np.int64)
    column_W = ((np.arange(width) + 0.5) * columns / width).astype(np.int64)
    patch_HW = row_H[:, None] * columns + column_W
    pixels_L = np.bincount(patch_HW.ravel(), minlength=rows * columns)
    counted = mask_HW != NOT_COUNTED
    places = patch_HW[counted] * num_classes + mask_HW[counted]
    counts_LC = np.bincount(places, minlength=rows * columns * num_classes).reshape(rows * columns, num_classes)
    return torch.from_numpy(counts_LC / np.maximum(pixels_L, 1)[:, None]).float()


def train_heads(
    features_PD: Tensor,
    shares_PC: Tensor,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    description: str = "linear heads",
) -> tuple[Tensor, Tensor]:
    """Weights (T, D, C) and biases (T, C) of linear heads after SGD, one for each learning rate, all trained at once.

    Cross-entropy of each patch with the classes of its pixels, which is that of all its pixels together; momentum 0.9,
    the rate falls to zero along a cosine, heads start at zero. The gradient is written out. description: of the bar.
    """
    device, count = features_PD.device, len(features_PD)
    rates_T11 = torch.tensor(learning_rates, device=device)[:, None, None]
    weights = features_PD.new_zeros(len(learning_rates), features_PD.shape[1] + 1, shares_PC.shape[1])
    momenta = torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, count)
    total, step = epochs * math.ceil(count / batch_size), 0
    for _ in counted(range(epochs), description, unit="epoch"):
        for rows in torch.randperm(count, generator=generator).to(device).split(batch_size):
            features_BD, shares_BC = _with_one(features_PD[rows]), shares_PC[rows]
            probabilities_TBC = (features_BD @ weights).softmax(dim=2)
            gradients_TBC = probabilities_TBC * shares_BC.sum(dim=1, keepdim=True) - shares_BC
            momenta.mul_(0.9).add_(features_BD.T @ gradients_TBC / len(rows))
            weights -= rates_T11 * 0.5 * (1.0 + math.cos(math.pi * step / total)) * momenta
            step += 1
    return weights[:, :-1], weights[:, -1]


def _with_one(features_BD: Tensor) -> Tensor:
    """The features and a constant, whose weight is the bias."""
    return torch.cat([features_BD, features_BD.new_ones(len(features_BD), 1)], dim=1)


def cross_entropy(logits_PC: Tensor, shares_PC: Tensor) -> float:
    """The mean over counted pixels of the cross-entropy; infinite where a head has diverged."""
    value = -(shares_PC * logits_PC.log_softmax(dim=1)).sum() / shares_PC.sum().clamp(min=1e-12)
    return value.nan_to_num(nan=torch.inf).item()


def neighbour_classes(similarities_PK: Tensor, shares_PKC: Tensor, *, temperature: float) -> Tensor:
    """The mean classes (P, C) of the neighbours of each patch, weighted by the softmax of similarity / temperature."""
    return ((similarities_PK / temperature).softmax(dim=1)[..., None] * shares_PKC).sum(dim=1)


def segment(scores_LC: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> NDArray[np.int64]:
    """The best class of each pixel (H, W): the scores of the patches, interpolated bilinearly to the image's size."""
    scores_1CRS = scores_LC.T.unflatten(1, grid)[None]
    return interpolate(scores_1CRS, size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0).numpy()


@dataclass(frozen=True)
class Overlaps:
    """Counted pixels of each image and class (I, C): of the class, taken for it, and both."""

    of_class: Tensor
    taken: Tensor
    both: Tensor

    def class_ious(self) -> Tensor:
        """Intersection over union (C,) over all images, in percent; NaN for a class that no image has."""
        return _ious(*(part.sum(dim=0)[None] for part in (self.of_class, self.taken, self.both)))[0]

    def pixel_accuracies(self) -> tuple[Tensor, Tensor]:
        """Right and counted pixels of each image (I,)."""
        return self.both.sum(dim=1), self.of_class.sum(dim=1)


def overlap(predicted_HW: NDArray[np.int64], mask_HW: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Pixels (3, C) of one image: of each class, taken for it, and both; those that are not counted are in none."""
    counted = mask_HW != NOT_COUNTED
    predicted, true = predicted_HW[counted], mask_HW[counted]
    return np.stack([np.bincount(part, minlength=num_classes) for part in (true, predicted, true[predicted == true])])


def overlaps_of(images: Sequence[NDArray[np.int64]]) -> Overlaps:
    """Those of all images, from `overlap` of each."""
    stacked_3IC = torch.from_numpy(np.stack(images, axis=1)).double()
    return Overlaps(stacked_3IC[0], stacked_3IC[1], stacked_3IC[2])


def overlap_scores(found: Overlaps, *, seed: int = 0) -> dict[str, tuple[float, tuple[float, float]]]:
    """`miou` and `pixel_accuracy` in percent, each with its interval over images, from a fixed seed.

    miou: the mean over the classes that the masks have; of classes without a pixel in a resample there is none.
    """
    generator, count = torch.Generator().manual_seed(seed), len(found.both)
    drawn_XI = torch.randint(count, (RESAMPLES, count), generator=generator)
    weights_XI = torch.zeros(RESAMPLES + 1, count, dtype=torch.float64)
    weights_XI[1:].scatter_add_(1, drawn_XI, torch.ones_like(drawn_XI, dtype=torch.float64))
    weights_XI[0] = 1  # the images themselves
    ious_XC = _ious(*(weights_XI @ part for part in (found.of_class, found.taken, found.both)))
    right_I, counted_I = found.pixel_accuracies()
    accuracy_X = 100.0 * (weights_XI @ right_I) / (weights_XI @ counted_I).clamp(min=1)
    result = {}
    for name, values_X in (("miou", ious_XC.nanmean(dim=1)), ("pixel_accuracy", accuracy_X)):
        value = values_X[0].item()
        result[name] = (value, or_of_a_share(percentiles(values_X[1:]), value, count))
    return result


def _ious(of_class_XC: Tensor, taken_XC: Tensor, both_XC: Tensor) -> Tensor:
    unions_XC = of_class_XC + taken_XC - both_XC
    return torch.where(of_class_XC > 0, 100.0 * both_XC / unions_XC, torch.nan)
