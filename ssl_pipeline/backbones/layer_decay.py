"""Learning rates that shrink towards the input of a ViT (BEiT, Bao et al., 2021, https://arxiv.org/abs/2106.08254)."""

from __future__ import annotations

import re

from torch import nn

from ssl_pipeline.config import ConfigError

FIRST_LAYER = ("cls_token", "pos_embed", "mask_token", "reg_token", "patch_embed.")
NOT_DECAYED = ("cls_token", "pos_embed", "mask_token", "reg_token")


def layer_lr_scale(name: str, *, num_blocks: int, decay: float, patch_embed_scale: float = 1.0) -> float:
    """The factor on the learning rate of the parameter `name` of a timm ViT: decay^(num_blocks + 1 - layer).

    Class, mask and register tokens, the position table and the patch embedding are layer 0, `blocks.i.*` layer i + 1,
    everything else layer num_blocks + 1, whose factor is 1. The patch embedding's is also multiplied by
    `patch_embed_scale` (DINOv2: 0.2).
    """
    scale = decay ** (num_blocks + 1 - layer_number(name, num_blocks))
    return scale * patch_embed_scale if name.startswith("patch_embed.") else scale


def layer_number(name: str, num_blocks: int) -> int:
    """The layer of the parameter `name` of a timm ViT, from 0 to num_blocks + 1."""
    if name.startswith(FIRST_LAYER):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else num_blocks + 1


def layer_decay_groups(
    model: nn.Module, *, decay: float, weight_decay: float, patch_embed_scale: float = 1.0
) -> list[dict[str, object]]:
    """The trained parameters of a ViT as optimizer groups {"params", "lr_scale", "weight_decay"}, for fine-tuning.

    The ViT may lie inside `model`; everything else (a classifier) has the factor 1. The number of blocks is read from
    the names. 1-D tensors, biases, class, mask and register tokens and the position table are not decayed. Raises
    ConfigError if there are no blocks, or those of several networks.
    """
    prefix, num_blocks = find_blocks(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = name.removeprefix(prefix) if name.startswith(prefix) else f"outside.{name}"
        scale = layer_lr_scale(inside, num_blocks=num_blocks, decay=decay, patch_embed_scale=patch_embed_scale)
        spared = parameter.ndim <= 1 or name.endswith(".bias") or inside.startswith(NOT_DECAYED)
        groups.setdefault((scale, 0.0 if spared else weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay_of_group}
        for (scale, decay_of_group), parameters in groups.items()
    ]


def find_blocks(model: nn.Module) -> tuple[str, int]:
    """What comes before `blocks.` in the names of a ViT's parameters, and the number of its blocks."""
    found: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        if parts := re.match(r"((?:\w+\.)*?)blocks\.(\d+)\.", name):
            found.setdefault(parts[1], set()).add(parts[2])
    if len(found) != 1:
        places = ", ".join(f"'{prefix}blocks'" for prefix in found) or "none"
        raise ConfigError(f"layer-wise rates need one network with blocks.0, blocks.1, ... (a ViT). Got {places}.")
    prefix, numbers = next(iter(found.items()))
    return prefix, len(numbers)
