"""Forward passes that leave the running statistics of batch norm unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ssl_pipeline.backbones.networks import batch_norms


@contextmanager
def kept_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, batch norms normalise by the batch, as in training, and their running statistics stay as they are.

    For passes other than the one that the running statistics are meant for: guesses, pseudo-labels.
    """
    norms = batch_norms(network)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
