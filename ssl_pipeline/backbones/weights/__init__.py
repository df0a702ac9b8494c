"""Weights of any origin into a timm network: `sources` (tag, file or run), `reading` (a file's tensors), `layouts` (the
names that others use, as tables), `matching` (which network in the file, under which layout), `fitting` (shapes),
`values` (their numbers), `loading` (all tensors, or an error)."""

from __future__ import annotations

from ssl_pipeline.backbones.weights.loading import Taken, load_weights
from ssl_pipeline.backbones.weights.reading import first_line, read_tensors
from ssl_pipeline.backbones.weights.sources import (
    RANDOM,
    Origin,
    file_of,
    find_in_run,
    holds_checkpoints,
    is_tag,
    load_source,
    require_place,
    tensors_of,
    to_be_fetched,
    without_hub,
    without_name,
)
from ssl_pipeline.backbones.weights.values import require_floats

__all__ = [
    "RANDOM",
    "Origin",
    "Taken",
    "file_of",
    "find_in_run",
    "first_line",
    "holds_checkpoints",
    "is_tag",
    "load_source",
    "load_weights",
    "read_tensors",
    "require_floats",
    "require_place",
    "tensors_of",
    "to_be_fetched",
    "without_hub",
    "without_name",
]
