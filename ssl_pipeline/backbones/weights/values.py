"""What the numbers of weights must be: of floating point, and finite in float32, in which networks are trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ssl_pipeline.config import ConfigError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST = torch.finfo(torch.float32).max


def require_floats(weights: Iterable[tuple[str, Tensor]], *, source: str) -> None:
    """ConfigError that names the first tensor, by its name in the file `source`, that no weight can be."""
    for name, value in weights:
        dtype = str(value.dtype).removeprefix("torch.")
        if value.dtype not in FLOATS:
            raise ConfigError(
                f"{source}: {name[:80]} is {dtype}; weights are float32, float16, bfloat16 or float64. Needed: weights "
                "that are not quantised."
            )
        if not _is_finite(value):
            raise ConfigError(
                f"{source}: {name[:80]} is not finite: it has NaN, or values beyond float32. Take weights from before "
                "that, or copy the file again."
            )


def _is_finite(value: Tensor) -> bool:
    """Whether all values are numbers that float32 holds."""
    if value.is_meta or not value.numel():
        return True
    extremes = torch.stack(value.detach().aminmax())  # a tenth of isfinite's time, and NaN stays NaN
    return bool((extremes.double().abs() <= LARGEST).all())
