"""Batch norm's statistics: the one thing that a forward pass changes, which a step that is left out takes back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones.networks import batch_norms


class NormStatistics:
    """The statistics of all batch norms of a module, which can be kept and restored."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [buffer for part in batch_norms(module) for buffer in part.buffers(recurse=False)]
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are now."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Make them what `keep` remembered, bit for bit."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)
