"""Whether a classifier is right as often as it says (Guo et al., 2017, https://arxiv.org/abs/1706.04599)."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15  # the paper's

# Axes: N images, B bins of the confidence.


def expected_calibration_error(confidence_N: Tensor, right_N: Tensor, *, bins: int = BINS) -> float:
    """ECE in percent: how far confidence and accuracy are apart, over bins of the confidence.

    Shapes: confidence (N,), the largest probability of each image; right (N,) bool, whether its class is the label. Bin
    b of B takes confidences in (b / B, (b + 1) / B]:

        100 * sum over bins of  images_b / N * |accuracy_b - mean confidence_b|

    Raises ValueError for shapes that do not fit, and without images.
    """
    if confidence_N.ndim != 1 or len(confidence_N) == 0 or right_N.shape != confidence_N.shape:
        raise ValueError(
            "expected_calibration_error needs confidence (N,) and right (N,), N >= 1. "
            f"Got {tuple(confidence_N.shape)} and {tuple(right_N.shape)}."
        )
    confidence_N = confidence_N.double()
    bins_N = ((confidence_N * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap_N = right_N.double() - confidence_N
    gaps_B = torch.zeros(bins, dtype=torch.float64).index_add_(0, bins_N, gap_N)
    return 100.0 * gaps_B.abs().sum().item() / len(confidence_N)
