"""Full precision for losses: outside autocast, with half precision promoted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def float32(loss: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run a loss outside autocast, with half-precision inputs promoted; float32 and float64 stay as they are.

    Promotion alone is not enough: under bfloat16 autocast `x.float() @ y.float().T` is bfloat16 again.
    """

    @functools.wraps(loss)
    def in_full_precision(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device_type = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        promoted = tuple(_promote(value) for value in args)
        promoted_by_name = {name: _promote(value) for name, value in kwargs.items()}
        with torch.autocast(device_type, enabled=False):
            return loss(*promoted, **promoted_by_name)  # type: ignore[arg-type]

    return in_full_precision


def _promote(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """What a matrix product of this tensor is computed in here: its own dtype, or that of an autocast around."""
    device_type = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def in_matmul_dtype(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both as their matrix products take them here; what is one tensor is converted once."""
    converted = first.to(matmul_dtype(first))
    return converted, converted if second is first else second.to(matmul_dtype(second))


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over this tensor are computed in: float64 stays, everything else is float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
