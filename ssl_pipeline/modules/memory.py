"""Features that are remembered across steps (He et al., 2019, https://arxiv.org/abs/1911.05722)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """The `size` newest features, first in first out; random directions until they are replaced.

    features: (size, dim). position: the next row to be replaced.
    """

    features: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, features: Tensor) -> None:
        """Replace the oldest rows by `features` (B, dim), gathered from all processes in rank order."""
        size, num_new = len(self.features), len(features)
        if num_new == 0 or size % num_new:
            raise ValueError(
                f"the queue's size must be a multiple of the global batch. Got {size} places and {num_new} features."
            )
        rows = self.position + torch.arange(num_new, device=features.device)
        self.features.index_copy_(0, rows % size, features.to(self.features.dtype))
        self.position.add_(num_new).remainder_(size)
