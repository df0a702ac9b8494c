"""How the parameters of a method deviate from the optimizer's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ssl_pipeline.backbones import Backbone, layer_lr_scale
from ssl_pipeline.backbones.layer_decay import find_blocks
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

    decays: bool = True
    """Whether they have weight decay where `weight_decay_on` would give it; BEiT's class token has none."""

    def __post_init__(self) -> None:
        if not isinstance(self.frozen_for, Duration):
            object.__setattr__(self, "frozen_for", Duration(self.frozen_for))

    def is_frozen(self, progress: Progress) -> bool:
        """Whether the parameters get no update in the step at `progress`."""
        assert isinstance(self.frozen_for, Duration)
        return progress.step < self.frozen_for.steps(progress)


def layer_decay_rules(
    backbone: Backbone, prefix: str, *, decay: float, patch_embed_scale: float = 1.0
) -> tuple[ParamRule, ...]:
    """Rules by which the learning rate of a ViT shrinks towards its input, as `layer_lr_scale` says.

    prefix: the prefix of the backbone's names in those of the method, for instance `student.backbone.`. There is
    one rule for each trained part whose factor is not 1. A mask token of the method's own needs a rule of its own:
    ParamRule("mask_token", layer_lr_scale("mask_token", ...)). Raises ConfigError for a network without blocks.
    """
    _, num_blocks = find_blocks(backbone.model)
    scales: dict[str, float] = {}
    for name, parameter in backbone.model.named_parameters():
        if parameter.requires_grad:
            names = name.split(".")
            part = ".".join([*names[: 2 if names[0] == "blocks" else 1], ""]) if len(names) > 1 else name
            scales[part] = layer_lr_scale(name, num_blocks=num_blocks, decay=decay, patch_embed_scale=patch_embed_scale)
    return tuple(ParamRule(f"{prefix}model.{part}", scale) for part, scale in scales.items() if scale != 1.0)


def untouched_by_decay(
    method: nn.Module, prefix: str, *, tokens: tuple[str, ...] = ("cls_token", "pos_embed")
) -> tuple[ParamRule, ...]:
    """Rules that spare these parameters of a ViT weight decay, where it has and trains them (BEiT, SimMIM).

    prefix: the prefix of the backbone's names in those of the method.
    """
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    names = [f"{prefix}model.{token}" for token in tokens]
    return tuple(ParamRule(name, decays=False) for name in names if name in trained)


class Trained(Protocol):
    """What an optimizer needs to know about a method, whose contract is in a higher room."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def param_rules(self) -> tuple[ParamRule, ...]: ...
