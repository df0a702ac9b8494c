"""How the parameters of a method depart from the optimizer's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from ssl_pipeline.schedule import Duration, Progress


@dataclass(frozen=True)
class ParamRule:
    """How the parameters whose name begins with `prefix` are trained; the first rule that fits applies."""

    prefix: str
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    constant_lr: bool = False
    """Whether the learning rate stays at its base value, without warm-up and decay."""
    frozen_for: Duration | int | str = 0
    """Duration from the start in which the parameters get no update at all: no decay and no momentum either."""
    _frozen_for: Duration = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        frozen_for = self.frozen_for if isinstance(self.frozen_for, Duration) else Duration(self.frozen_for)
        object.__setattr__(self, "_frozen_for", frozen_for)

    def is_frozen(self, progress: Progress) -> bool:
        """Whether the parameters get no update in the step at `progress`."""
        return progress.step < self._frozen_for.steps(progress)


class Trained(Protocol):
    """What an optimizer needs to know of a network: a method, whose contract lies above this room."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def param_rules(self) -> tuple[ParamRule, ...]: ...
