"""A backbone as timm runs it without this library."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from ssl_pipeline.backbones import Argument, BackboneOfRun
from ssl_pipeline.backbones.networks import TokenBackbone
from ssl_pipeline.backbones.positions import resample_positions
from ssl_pipeline.config import ConfigError


def require_own_features(found: BackboneOfRun) -> None:
    """Raises ConfigError for a network whose features are not those of timm's."""
    config = found.backbone.config
    if config.reversible:
        raise ConfigError(
            f"'{config.name}' with reversible=true has two streams through its blocks, which timm's does not have. "
            "format=backbone works, with ssl_pipeline.load."
        )
    if config.class_tokens:
        raise ConfigError(
            f"'{config.name}' with class_tokens={config.class_tokens} has the tokens of its blocks as features, which "
            "timm's does not. format=backbone works, with ssl_pipeline.load."
        )


def plain_model(found: BackboneOfRun) -> nn.Module:
    """The timm model of the backbone, in eval mode, with the features that the backbone has for images of its size.

    A ViT's position table is resampled to that size first: timm's forward does it differently from DINO and this
    library.
    """
    backbone, size = found.backbone.eval(), found.preprocessing.size
    if not _is_resampled(found):
        return backbone.model.to(memory_format=torch.contiguous_format)
    assert isinstance(backbone, TokenBackbone)
    arguments: dict[str, Any] = {**arguments_of(found)}
    model = timm.create_model(backbone.config.name, num_classes=0, **arguments)
    state, grid = dict(backbone.model.state_dict()), backbone.grid
    table, number = state["pos_embed"], size // backbone.patch_size
    num_prefix = table.shape[1] - grid[0] * grid[1]
    patches = resample_positions(table[:, num_prefix:], grid, (number, number))
    state["pos_embed"] = torch.cat([table[:, :num_prefix], patches], dim=1)
    model.load_state_dict(state)
    return model.eval()


def arguments_of(found: BackboneOfRun) -> dict[str, Argument]:
    """What timm needs besides the name to build `plain_model`."""
    own = found.backbone.config.arguments
    return own | ({"img_size": found.preprocessing.size} if _is_resampled(found) else {})


def _is_resampled(found: BackboneOfRun) -> bool:
    """Whether a position table is learnt for images of another size."""
    backbone, size = found.backbone, found.preprocessing.size
    if not isinstance(backbone, TokenBackbone) or not isinstance(backbone.model, VisionTransformer):
        return False
    return backbone.model.pos_embed is not None and backbone.grid != (size // backbone.patch_size,) * 2
