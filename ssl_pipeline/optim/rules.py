"""How the parameters of a method depart from the optimizer's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn


@dataclass(frozen=True)
class ParamRule:
    """How the parameters whose name begins with `prefix` are trained; the first rule that fits applies."""

    prefix: str
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    constant_lr: bool = False
    """Whether the learning rate stays at its base value, without warm-up and decay."""
    frozen_for: int | str = 0
    """Duration from the start in which the parameters get no update at all: no decay and no momentum either."""


class Trained(Protocol):
    """What an optimizer needs to know of a network: a method, whose contract lies above this room."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def param_rules(self) -> tuple[ParamRule, ...]: ...
