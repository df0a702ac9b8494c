"""How good patch features of images with masks are: a linear head on them, and their nearest neighbours.

The linear head is DINOv2's (Oquab et al., 2023, section 7.4, https://arxiv.org/abs/2304.07193): one linear layer on
normalised patch tokens, its scores interpolated to the size of the image. The neighbours are those of Balazevic et al.
(2023, https://arxiv.org/abs/2306.01667): each patch takes the classes of the most similar training patches, weighted by
the softmax of their cosines.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import ConfigError
from ssl_pipeline.eval.dense_images import Mask
from ssl_pipeline.eval.dense_sets import ChosenPatches, DenseConfig, DenseSets
from ssl_pipeline.eval.measures import Found, Measure
from ssl_pipeline.eval.progress import counted
from ssl_pipeline.eval.search.neighbours import nearest_neighbours, require_finite
from ssl_pipeline.eval.segmentation import (
    Overlaps,
    cross_entropy,
    neighbour_classes,
    overlap,
    overlap_scores,
    overlaps_of,
    segment,
    train_heads,
)
from ssl_pipeline.files import JSON

SEARCHED_TOGETHER = 4096  # patches of test images whose classes are predicted at once

# Axes: I images, L patches of each, P patches of training images, Q of test images, D dimensions, C classes.

ScoresOf = Callable[[Tensor], Tensor]
"""Features (Q, D) of patches -> scores (Q, C) of their classes."""


def linear_head(features_PD: Tensor, patches: ChosenPatches, config: DenseConfig) -> tuple[ScoresOf, dict[str, JSON]]:
    """The head with the rate that is best on held-out images, trained again on all; and what was chosen."""
    mean_D, std_D = features_PD.mean(dim=0), features_PD.std(dim=0).clamp(min=1e-6)
    features_PD, held_P = (features_PD - mean_D) / std_D, patches.held_out
    settings = {"epochs": config.epochs, "batch_size": config.sgd_batch_size, "seed": config.seed}
    weights, biases = train_heads(
        features_PD[~held_P],
        patches.shares[~held_P],
        learning_rates=config.learning_rates,
        description=f"linear head, {len(config.learning_rates)} rates",
        **settings,
    )
    losses = [
        cross_entropy(features_PD[held_P] @ weight + bias, patches.shares[held_P])
        for weight, bias in zip(weights, biases, strict=True)
    ]
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[best] == float("inf"):
        raise ConfigError(f"Every rate of the linear head diverged ({len(losses)} tried). Try smaller learning_rates.")
    rate = config.learning_rates[best]
    (weight,), (bias,) = train_heads(
        features_PD, patches.shares, learning_rates=(rate,), description="linear head, all images", **settings
    )
    tried = [
        {"learning_rate": tried, "validation_loss": loss}
        for tried, loss in zip(config.learning_rates, losses, strict=True)
    ]
    return lambda features_QD: ((features_QD - mean_D) / std_D) @ weight + bias, {
        "chosen": {"learning_rate": rate},
        "sweep": tried,
    }


def neighbour_head(
    features_PD: Tensor, patches: ChosenPatches, config: DenseConfig
) -> tuple[ScoresOf, dict[str, JSON]]:
    """The classes of the most similar training patches; and how many there are."""
    bank_PD = normalize(features_PD, dim=1)

    def scores_of(features_QD: Tensor) -> Tensor:
        similarities_QK, nearest_QK = nearest_neighbours(bank_PD, normalize(features_QD, dim=1), k=config.k)
        return neighbour_classes(similarities_QK, patches.shares[nearest_QK], temperature=config.temperature)

    return scores_of, {"bank": len(bank_PD)}


HEADS = {"linear": linear_head, "knn": neighbour_head}


def measure_dense(
    train_ILD: Tensor,
    test_ILD: Tensor,
    patches: ChosenPatches,
    *,
    sets: DenseSets,
    grid: tuple[int, int],
    config: DenseConfig,
) -> Found:
    """Both heads on the features of the patches of training and test images."""
    features_PD = train_ILD.flatten(0, 1)[patches.place].float()
    require_finite(features_PD, task="Segmentation", what="training patches")
    heads = {name: HEADS[name](features_PD, patches, config) for name in config.heads}
    found: dict[str, list[Mask]] = {name: [] for name in heads}
    together = max(1, SEARCHED_TOGETHER // test_ILD.shape[1])
    for first in counted(range(0, len(test_ILD), together), "segments of test images", unit="block"):
        features_ILD = test_ILD[first : first + together].float()
        require_finite(features_ILD.flatten(0, 1), task="Segmentation", what="test patches")
        masks = [sets.mask(sets.test, first + place) for place in range(len(features_ILD))]
        for name, (scores_of, _) in heads.items():
            scores_ILC = scores_of(features_ILD.flatten(0, 1)).unflatten(0, features_ILD.shape[:2])
            for scores_LC, mask_HW in zip(scores_ILC, masks, strict=True):
                predicted_HW = segment(scores_LC, grid, mask_HW.shape)
                found[name].append(overlap(predicted_HW, mask_HW, len(sets.numbers)))
    titles, measures = {"linear": "linear", "knn": f"k-NN, k={config.k}"}, []
    details: dict[str, JSON] = {}
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
