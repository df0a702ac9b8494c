"""Whether what was written computes what the backbone computes."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import Tensor

from ssl_pipeline.backbones import BackboneOfRun
from ssl_pipeline.config import RunError

TOLERANCE = 1e-4
"""Absolute, and relative to the largest feature."""
BATCH, SEED = 2, 0


def example_images(size: int, *, count: int = BATCH) -> Tensor:
    """(count, 3, size, size), normalised, the same in every call."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(SEED))


def expected_features(found: BackboneOfRun, images: Tensor) -> Tensor:
    """(N, D) of the backbone itself, on the CPU."""
    with torch.no_grad():
        return found.backbone.eval()(images)


def require_same(features_ND: Tensor, expected_ND: Tensor, *, reader: str) -> float:
    """The largest difference; RunError if it is beyond TOLERANCE, or the shapes differ."""
    if features_ND.shape != expected_ND.shape:
        raise RunError(
            f"{reader} makes features of shape {tuple(features_ND.shape)}, the backbone {tuple(expected_ND.shape)}. "
            "Nothing was written; format=backbone always works."
        )
    difference = float((features_ND - expected_ND).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected_ND.abs().max())):
        raise RunError(
            f"{reader} computes different features from the backbone: they differ by {difference:.2g}. "
            "Nothing was written; format=backbone always works."
        )
    return difference


@contextmanager
def quiet() -> Iterator[None]:
    """Without the output of another library while it works: its failures come as errors."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
