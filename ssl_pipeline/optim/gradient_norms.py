"""Gradient norms layer by layer: where a loss acts, and where its gradient vanishes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone, layers_of
from ssl_pipeline.config import ConfigError
from ssl_pipeline.sharded import norms


class GradientNorms:
    """The gradient norm of each layer of the backbones that a method trains, and of each other part.

    Layers are those of `layers_of`, counted from the input: `student.backbone.layer03`; a backbone whose layers are
    unknown is one part. Everything else is named as far as the part next to a backbone: `student.head`, `predictor`.
    """

    def __init__(self, method: nn.Module) -> None:
        backbones = {name: part for name, part in method.named_modules() if isinstance(part, Backbone)}
        around = {".".join(name.split(".")[:depth]) for name in backbones for depth in range(len(name.split(".")))}
        starts = [start for name, backbone in backbones.items() for start in _layer_names(name, backbone)]
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                group = next((group for start, group in starts if name.startswith(start)), None)
                found.setdefault(group or _beside(name, around), []).append(parameter)
        self.names = tuple(found)
        self._members = [(number, one) for number, group in enumerate(found.values()) for one in group]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The norms (groups,) of the gradients that are there, in the order of `names`; 0 where there is none."""
        there = [(number, one.grad) for number, one in self._members if one.grad is not None]
        norms_P = norms([gradient for _, gradient in there]).float()
        places_P = torch.tensor([number for number, _ in there]).to(norms_P.device, non_blocking=True)
        return norms_P.new_zeros(len(self.names)).index_add(0, places_P, norms_P.square()).sqrt()


def _layer_names(name: str, backbone: Backbone) -> list[tuple[str, str]]:
    """The prefix of the parameters of each part of a backbone, and the name of its group."""
    try:
        layers = layers_of(backbone.model)
    except ConfigError:
        return [(f"{name}.", name)]
    return [(f"{name}.model.{part.name}", f"{name}.layer{part.layer:02d}") for part in layers.parts]


def _beside(name: str, around: set[str]) -> str:
    """The part of a parameter outside of backbones: one name more than what it shares with one."""
    names = name.split(".")
    shared = max(depth for depth in range(len(names)) if ".".join(names[:depth]) in around | {""})
    return ".".join(names[: shared + 1])
