"""The settings of a recipe as a run has them."""

from __future__ import annotations

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, read_recipe, validate


def settings_of(recipe: str) -> PretrainConfig:
    """What `pretrain.py recipe=NAME --print` shows."""
    return validate(PretrainConfig, {**read_recipe(recipe, RECIPES), "recipe": recipe})
