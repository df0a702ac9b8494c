"""The layers of a network from its input to its features, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from timm.models import group_parameters
from torch import nn

from ssl_pipeline.backbones.layer_decay import NOT_DECAYED, find_blocks, layer_number
from ssl_pipeline.config import ConfigError


@dataclass(frozen=True)
class Part:
    """A part of a network that belongs to one layer: its name is the prefix of its parameters' names. The first layer
    is 0."""

    name: str
    layer: int
    is_token: bool = False
    """Whether it is a class, mask or register token or a position table, which have no weight decay in fine-tuning."""


@dataclass(frozen=True)
class Layers:
    """The largest parts of which each lies in one layer, and the number of what comes after all: a classifier's.

    A ViT's are those of `layer_lr_scale`: tokens, positions and patch embedding are layer 0, block i layer i + 1, and
    the last norm has the number of the classifier. Another network's are those of timm's `group_matcher`, each block a
    layer.
    """

    parts: tuple[Part, ...]
    after: int


def layers_of(model: nn.Module) -> Layers:
    """The layers of a timm network, those of its trained parameters; ConfigError if timm does not know them."""
    numbers, after = _numbers(model)
    return Layers(tuple(_largest_parts(model, "", numbers)), after)


def _numbers(model: nn.Module) -> tuple[dict[str, int], int]:
    """The layer of each trained parameter, and the number of what comes after all of them."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        _, num_blocks = find_blocks(model)
        return {name: layer_number(name, num_blocks) for name in trained}, num_blocks + 1
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"The layers of {type(model).__name__} are unknown: it is not a ViT and has no group_matcher, unlike most "
            "timm networks. Leave layer-wise settings out."
        )
    known: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
    return {name: known[name] for name in trained}, max(known.values()) + 1


def _largest_parts(module: nn.Module, start: str, numbers: dict[str, int]) -> Iterator[Part]:
    inside = {layer for name, layer in numbers.items() if name.startswith(start)}
    if not inside:
        return
    if len(inside) == 1 and start:
        yield Part(start, inside.pop())
        return
    for name, _ in module.named_parameters(start.removesuffix("."), recurse=False):
        if name in numbers:
            yield Part(name, numbers[name], is_token=name.startswith(NOT_DECAYED))
    for name, child in module.named_children():
        yield from _largest_parts(child, f"{start}{name}.", numbers)
