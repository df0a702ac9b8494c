"""Checks that the losses share."""

from __future__ import annotations

from torch import Tensor


def check_positive(where: str, **values: float) -> None:
    """Raises ValueError unless every value is above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{where} needs {name} above 0. Got {value}.")


def check_same_logits(where: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all are (N, C) of one shape, N >= 1."""
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] == 0:
        raise ValueError(
            f"{where} needs {', '.join(tensors)} of one shape (N, C), N >= 1. Got {', '.join(map(str, shapes))}."
        )
