"""What can happen to the colours of a view: one file for each operation.

A new operation is a file like `solarize.py` and its word in OPERATIONS. Its keys in a group of views, its random
numbers and its turn on every device follow from there.
"""

from __future__ import annotations

from ssl_pipeline.augment.operations.base import Operation, PerView, ViewSettings
from ssl_pipeline.augment.operations.blur import Blur
from ssl_pipeline.augment.operations.cutout import Cutout
from ssl_pipeline.augment.operations.grayscale import Grayscale
from ssl_pipeline.augment.operations.jitter import Jitter
from ssl_pipeline.augment.operations.rand_augment import RandAugment
from ssl_pipeline.augment.operations.solarize import Solarize

__all__ = ["OPERATIONS", "Operation", "PerView", "ViewSettings"]

OPERATIONS: tuple[Operation, ...] = (Jitter(), Grayscale(), Blur(), Solarize(), RandAugment(), Cutout())
"""In the order in which they are applied, and in which they take their uniforms."""
