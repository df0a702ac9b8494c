"""The votes of neighbours for their classes, and how often the class with the most is the right one."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.config import ConfigError
from ssl_pipeline.eval.accuracy import top_k_hits

# Axes: N test images, K neighbours, C classes.


def vote(similarities_NK: Tensor, labels_NK: Tensor, *, temperature: float, num_classes: int) -> Tensor:
    """Scores (N, C): the sum of exp(similarity / temperature) over the neighbours of each class."""
    if temperature <= 0:
        raise ConfigError(f"k-NN needs a temperature above 0. Got temperature={temperature}.")
    weights_NK = (similarities_NK / temperature).exp()
    scores_NC = weights_NK.new_zeros(len(weights_NK), num_classes).scatter_add_(1, labels_NK, weights_NK)
    if not scores_NC.amax(dim=1).isfinite().all():  # votes are positive: an infinite one is the most
        raise ConfigError(
            f"k-NN votes exp(similarity / temperature) overflow at temperature={temperature}. "
            "Normalise the features, or try temperature=0.02 or more."
        )
    return scores_NC


def votes_accuracy(
    similarities_NK: Tensor,
    labels_NK: Tensor,
    test_labels: Tensor,
    *,
    k: tuple[int, ...],
    temperature: float,
    num_classes: int,
) -> dict[int, dict[str, float]]:
    """The accuracy for each k, of neighbours most similar first: no more are counted than the k first."""
    found, labels_N = {}, test_labels.to(labels_NK.device)
    for count in k:
        scores_NC = vote(
            similarities_NK[:, :count], labels_NK[:, :count], temperature=temperature, num_classes=num_classes
        )
        top1, top5 = voted_hits(scores_NC, labels_N).sum(dim=1).tolist()
        found[count] = {"top1": 100.0 * top1 / len(labels_N), "top5": 100.0 * top5 / len(labels_N)}
    return found


def voted_hits(scores_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Whether each image's class is the one with the most votes, and among the five with the most: (2, N) bool.

    A class that no neighbour voted for is never among them, however few have votes.
    """
    has_votes_N = scores_NC.gather(1, labels_N[:, None])[:, 0] > 0
    return torch.stack([top_k_hits(scores_NC, labels_N, k=k) & has_votes_N for k in (1, 5)])
