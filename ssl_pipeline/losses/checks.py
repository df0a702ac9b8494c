"""What the losses refuse alike."""

from __future__ import annotations


def check_positive(where: str, **values: float) -> None:
    """Raises ValueError unless every value is above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{where} needs {name} above 0. Got {value}.")
