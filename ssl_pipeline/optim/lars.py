"""LARS (You et al., 2017, https://arxiv.org/abs/1708.03888) by the rules of MoCo v3 and of SimCLR."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ssl_pipeline.sharded import local_parts, norms


class LARS(Optimizer):
    """SGD with momentum whose step on each weight matrix is scaled to the length of the matrix.

    For a parameter p with gradient g, momentum buffer m:

        d = g + weight_decay * p
        d = d * trust_coefficient * |p| / |d|      (unscaled where |p| or |d| is 0)
        m = momentum * m + d
        p = p - lr * m

    The first two lines are left out for parameters of one dimension or none: biases and norms. With
    `lr_before_momentum` the buffer holds steps instead of directions (SimCLR's official code), which differs while the
    learning rate changes:

        m = momentum * m + lr * d
        p = p - m
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        *,
        lr_before_momentum: bool = False,
    ) -> None:
        if lr < 0 or momentum < 0 or weight_decay < 0 or trust_coefficient <= 0:
            raise ValueError(
                "LARS needs lr, momentum and weight_decay of at least 0 and a positive trust_coefficient. "
                f"Got {lr}, {momentum}, {weight_decay} and {trust_coefficient}."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "lr_before_momentum": lr_before_momentum,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            directions = _directions(parameters, group["weight_decay"], group["trust_coefficient"])
            buffers = local_parts(self._momentum_buffer(parameter) for parameter in parameters)
            torch._foreach_mul_(buffers, group["momentum"])
            lr_now, lr_later = (group["lr"], 1.0) if group["lr_before_momentum"] else (1.0, group["lr"])
            torch._foreach_add_(buffers, directions, alpha=lr_now)
            torch._foreach_add_(local_parts(parameters), buffers, alpha=-lr_later)
        return loss

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _directions(parameters: list[Tensor], weight_decay: float, trust_coefficient: float) -> list[Tensor]:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    directions = local_parts(gradients)
    adapted = [number for number, parameter in enumerate(parameters) if parameter.ndim > 1]
    if not adapted:
        return directions
    weights = [parameters[number] for number in adapted]
    decayed = torch._foreach_add([gradients[number] for number in adapted], weights, alpha=weight_decay)
    weight_norms_P, norms_P = norms(weights), norms(decayed)
    ratios = torch.where((weight_norms_P > 0) & (norms_P > 0), trust_coefficient * weight_norms_P / norms_P, 1.0)
    local_decayed = local_parts(decayed)
    torch._foreach_mul_(local_decayed, ratios.unbind())
    for number, direction in zip(adapted, local_decayed, strict=True):
        directions[number] = direction
    return directions
