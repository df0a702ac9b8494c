"""A backbone from its config: any timm model by name, with what a recipe changes about it."""

from __future__ import annotations

import warnings
from typing import Any

import timm
import torch
from timm.models import Beit, VisionTransformer
from torch import nn

import ssl_pipeline.backbones.dalle_encoder
import ssl_pipeline.backbones.wide_resnet  # noqa: F401  (both add a network to timm's registry)
from ssl_pipeline.backbones.config import BackboneConfig
from ssl_pipeline.backbones.initialisation import fix_positions, initialise
from ssl_pipeline.backbones.memory_format import choose_memory_format
from ssl_pipeline.backbones.networks import Backbone, TokenBackbone, batch_norms
from ssl_pipeline.backbones.reversible import mark_reversible
from ssl_pipeline.backbones.small_stem import shrink_stem, takes_small_stem
from ssl_pipeline.backbones.stochastic_depth import leave_images_out
from ssl_pipeline.backbones.tokens import has_tokens
from ssl_pipeline.backbones.weights import (
    Origin,
    file_of,
    first_line,
    is_tag,
    load_source,
    require_place,
    to_be_fetched,
)
from ssl_pipeline.config import ConfigError, nearest, some_of
from ssl_pipeline.config.printing import note

LARGEST_READ = 1 << 30  # bytes of a file that is read only to be compared: seconds
TAKES_A_FILE = "If it cannot be reached, set backbone.weights=FILE to a file downloaded elsewhere."


def create_backbone(config: BackboneConfig) -> Backbone:
    """The backbone that `config` describes, which it keeps; TokenBackbone for ViTs.

    Raises ConfigError for a mistake in `config`.
    """
    tag = _checked_tag(config)
    model = _create_model(config, tag=tag)
    if config.small_images:
        if not takes_small_stem(model):
            raise ConfigError(
                f"backbone.small_images needs a ResNet with a single stem convolution. '{config.name}' is not one; try "
                "resnet18, or backbone.small_images=false if the recipe sets it."
            )
        shrink_stem(model)
    if config.drop_path and config.drop_path_kind == "batch_subset":
        leave_images_out(model, config.drop_path, config.name)
    if config.reversible:
        mark_reversible(model, config.name)
    if has_tokens(model):
        backbone: Backbone = TokenBackbone(model)
    else:
        backbone = Backbone(model, memory_format=choose_memory_format(model))
    backbone.config = config
    if tag is not None:
        backbone.origin = Origin(f"timm's {config.name}.{tag}")
    elif config.weights is not None:
        backbone.origin = load_source(backbone.model, config.weights, network=config.weights_from)
    _prepare_vit(backbone, config)
    if config.class_tokens:
        if not isinstance(backbone, TokenBackbone):
            raise ConfigError(f"backbone.class_tokens needs a ViT. '{config.name}' is not one.")
        backbone.take_class_tokens(config.class_tokens, patch_mean=config.patch_mean)
    if config.frozen_batch_norm:
        if not batch_norms(backbone):
            raise ConfigError(f"backbone.frozen_batch_norm needs batch norm. '{config.name}' has none; leave it out.")
        backbone.keeps_statistics = True
        backbone.train()
    if config.checkpoint_activations:
        _checkpoint_activations(backbone, config.name)
    return backbone


def outline_backbone(config: BackboneConfig) -> Backbone:
    """The backbone without memory, on torch's meta device; weights are compared with it if their file exists.

    For a tag only the name is looked up; nothing is fetched. Raises ConfigError as `create_backbone` does.
    """
    _checked_tag(config)
    with torch.device("meta"):
        backbone = create_backbone(config.model_copy(update={"weights": None, "weights_from": None}))
    if config.weights is None or is_tag(config.weights):
        return backbone
    file = file_of(require_place(config.weights), network=config.weights_from)
    if file is not None and file.stat().st_size <= LARGEST_READ:
        with warnings.catch_warnings(action="ignore"):  # torch rejects the values even for a network without memory
            load_source(backbone.model, config.weights, network=config.weights_from)
    return backbone


def _checked_tag(config: BackboneConfig) -> str | None:
    """The tag of timm that the weights are, if they are one; Raises ConfigError for an unknown model or tag, and for
    settings that exclude pretrained weights.
    """
    if not timm.is_model(config.name):
        raise ConfigError(f"No timm model '{config.name}'.{nearest(config.name, timm.list_models())}")
    tag = config.weights if config.weights is not None and is_tag(config.weights) else None
    if tag is not None:
        _check_tag(config.name, tag)
        if config.reversible:
            raise ConfigError(
                f"backbone.weights={tag} are weights of a ViT with one stream of tokens; a reversible one computes "
                "another function. Leave backbone.weights out, or set backbone.reversible=false."
            )
    if config.small_images and tag is not None:
        raise ConfigError(
            "backbone.small_images replaces the stem that pretrained weights need. Leave backbone.weights out, or set "
            "backbone.small_images=false."
        )
    if config.weights_from is not None and tag is not None:
        raise ConfigError(
            f"backbone.weights_from={config.weights_from} is for files and runs, which hold several networks. "
            f"'{tag}' is a tag of timm; leave weights_from out."
        )
    return tag


def _check_tag(name: str, tag: str) -> None:
    known = timm.list_pretrained(f"{name}.*")
    if f"{name}.{tag}" not in known:
        raise ConfigError(
            f"backbone.weights: there is no file, run or pretrained '{name}.{tag}'. Known: {some_of(known, tag)}"
        )


def _create_model(config: BackboneConfig, tag: str | None) -> nn.Module:
    name = config.name
    arguments: dict[str, Any] = dict(config.arguments)
    if tag is not None:
        name = f"{config.name}.{tag}"
        if (place := to_be_fetched(name)) is not None:
            note(f"fetching the weights {name} from {place}. {TAKES_A_FILE}")
    if config.drop_path and config.drop_path_kind == "per_image":
        arguments["drop_path_rate"] = config.drop_path
    try:
        try:
            return timm.create_model(name, tag is not None, num_classes=0, dynamic_img_size=True, **arguments)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            return timm.create_model(name, tag is not None, num_classes=0, **arguments)
    except Exception as error:  # whatever timm raises, the cause is in the config or the connection
        if tag is not None and isinstance(error, OSError):
            raise ConfigError(
                f"The weights {name} cannot be fetched: {first_line(error).rstrip('.')}. {TAKES_A_FILE}"
            ) from error
        unwanted = next((argument for argument in config.arguments if f"'{argument}'" in str(error)), None)
        hint = f" backbone.arguments.{unwanted}=null leaves it out." if unwanted else ""
        hint = " Set backbone.drop_path=0." if config.drop_path and "'drop_path_rate'" in str(error) else hint
        values = ", ".join(f"{argument}={value}" for argument, value in config.arguments.items())
        given = f" with backbone.arguments {values}" if values else ""
        reason = first_line(error).rstrip(".") if str(error).strip() else "it does not take them"
        raise ConfigError(f"timm cannot create '{name}'{given}: {reason}.{hint}") from error


def _prepare_vit(backbone: Backbone, config: BackboneConfig) -> None:
    """How the weights of a ViT begin and which of them stay as they are."""
    for setting in ("initial_weights", "fixed_positions", "frozen_patch_embed"):
        if getattr(config, setting) and not isinstance(backbone, TokenBackbone):
            given = f"{setting}={str(getattr(config, setting)).lower()}"
            raise ConfigError(f"backbone.{given} needs a ViT. '{config.name}' is not one.")
    if isinstance(backbone, TokenBackbone):
        if config.initial_weights is not None:
            as_beit = config.initial_weights == "beit"
            if not isinstance(backbone.model, (VisionTransformer, Beit) if as_beit else VisionTransformer):
                raise ConfigError(
                    f"backbone.initial_weights={config.initial_weights} works only with timm's VisionTransformer "
                    f"(vit_*){' and Beit (beit_*)' if as_beit else ''}. '{config.name}' is one of its "
                    f"{type(backbone.model).__name__}s; leave it out."
                )
            initialise(backbone.model, config.initial_weights)
        if config.fixed_positions:
            fix_positions(backbone.model, first_half="row" if config.initial_weights == "moco_v3" else "column")
        if config.frozen_patch_embed:
            backbone.model.patch_embed.requires_grad_(False)


def _checkpoint_activations(backbone: Backbone, name: str) -> None:
    if batch_norms(backbone):
        raise ConfigError(
            "backbone.checkpoint_activations needs a network without batch norm, which would count each batch twice. "
            f"'{name}' has batch norm."
        )
    try:
        backbone.model.set_grad_checkpointing()  # type: ignore[operator]
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"timm cannot checkpoint the activations of '{name}'.") from error
