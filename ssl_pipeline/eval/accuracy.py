"""Top-k accuracy of class scores, in percent; accuracy by class, and classes that are confused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Axes: N images, C classes.


def top_k_hits(scores_NC: Tensor, labels_N: Tensor, *, k: int) -> Tensor:
    """Whether each image's label is among its k best scored classes: (N,) bool.

    Equal scores rank by class number, so the answer does not depend on a sort. A row with NaN is a miss, as of a
    diverged probe.
    """
    label_scores_N1 = scores_NC.gather(1, labels_N[:, None])
    classes_C = torch.arange(scores_NC.shape[1], device=scores_NC.device)
    before_NC = (scores_NC > label_scores_N1) | ((scores_NC == label_scores_N1) & (classes_C < labels_N[:, None]))
    return (before_NC.sum(dim=1) < k) & ~scores_NC.isnan().any(dim=1)


def top_k_accuracy(scores_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """`{"top1": percent, "top5": percent}`; with fewer than 5 classes top-5 counts all of them."""
    hits = {k: int(top_k_hits(scores_NC, labels_N, k=k).sum()) for k in (1, 5)}
    return {f"top{k}": 100.0 * count / len(labels_N) for k, count in hits.items()}


@dataclass(frozen=True)
class Confused:
    """`count` images of class `label` that were taken for class `taken_for`."""

    label: int
    taken_for: int
    count: int


@dataclass(frozen=True)
class ByClass:
    """Images and percentages of each class (C,), NaN where there is none to count; the most frequent mistakes first.

    recall: of the images of a class those that were recognised. precision: of the images taken for it those that are.
    balanced: the mean recall of the classes that have images.
    """

    images: Tensor
    recall: Tensor
    precision: Tensor
    balanced: float
    confused: tuple[Confused, ...]


def by_class(predicted_N: Tensor, labels_N: Tensor, *, num_classes: int, pairs: int = 10) -> ByClass:
    """What predicted classes make of each class; at most `pairs` pairs of confused ones.

    Equally frequent pairs come in the order of their numbers.
    """
    predicted_N, labels_N = predicted_N.cpu(), labels_N.cpu()
    images_C, taken_C = (torch.bincount(classes, minlength=num_classes) for classes in (labels_N, predicted_N))
    right_C = torch.bincount(labels_N[predicted_N == labels_N], minlength=num_classes)
    recall_C, precision_C = 100.0 * right_C / images_C, 100.0 * right_C / taken_C
    wrong = predicted_N != labels_N
    found_P, counts_P = (labels_N[wrong] * num_classes + predicted_N[wrong]).unique(return_counts=True)
    first = counts_P.argsort(descending=True, stable=True)[:pairs].tolist()
    confused = tuple(
        Confused(int(found_P[pair]) // num_classes, int(found_P[pair]) % num_classes, int(counts_P[pair]))
        for pair in first
    )
    return ByClass(images_C, recall_C, precision_C, recall_C[images_C > 0].double().mean().item(), confused)
