"""The networks that are pretrained: any timm model by name, turned into features."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.layers import DropPath, PatchEmbed
from timm.models import ResNet, VisionTransformer
from timm.models.vision_transformer import checkpoint_seq
from torch import Tensor, nn

import ssl_pipeline.wide_resnet  # noqa: F401  (adds its network to timm's registry)
from ssl_pipeline.atomic import JSON, write_bytes, write_json
from ssl_pipeline.attention import choose_attention
from ssl_pipeline.config import Config, ConfigError, nearest
from ssl_pipeline.initialisation import fix_positions, initialise
from ssl_pipeline.masking import take_patches
from ssl_pipeline.positions import Grid, resample_positions, sincos_position_embedding
from ssl_pipeline.weights import WEIGHT_SUFFIXES, first_line, load_weights

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Preprocessing",
    "TokenBackbone",
    "create_backbone",
    "load_backbone",
    "save_backbone",
    "sincos_position_embedding",
    "without_drop_path",
]

RESERVED_ARGUMENTS = {
    "num_classes": "the head is always left out",
    "pretrained": "set backbone.weights",
    "checkpoint_path": "set backbone.weights",
    "drop_path_rate": "set backbone.drop_path",
    "dynamic_img_size": "it is always on where the model has it",
}


class BackboneConfig(Config):
    name: str
    """Name of a timm model, for instance resnet18 or vit_small_patch16_224."""
    arguments: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further arguments of the timm model, for instance {img_size: 32, patch_size: 4}."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Stochastic depth rate of the last block."""
    small_images: bool = False
    """ResNets only: a 3x3 stem of stride 1 and no max-pool, for images of about 32 pixels."""
    weights: str | None = None
    """Weights to start from: a file (.safetensors, .pth, .pt) or the tag of a pretrained timm model."""
    initial_weights: Literal["mae", "moco_v3"] | None = None
    """ViTs only: how the weights begin, as in the official code of MAE or MoCo v3; null leaves it to timm."""
    fixed_positions: bool = False
    """ViTs only: a table of sines that is not trained, instead of learnt positions (MAE, MoCo v3)."""
    frozen_patch_embed: bool = False
    """ViTs only: whether the patch embedding stays as it begins (MoCo v3)."""
    checkpoint_activations: bool = False
    """Whether the backward pass computes the blocks again instead of keeping what they computed: the same results in a
    fraction of the memory, about a quarter slower. Not for networks with batch norm."""

    @model_validator(mode="after")
    def _arguments_are_the_models_own(self) -> BackboneConfig:
        for argument, reason in RESERVED_ARGUMENTS.items():
            if argument in self.arguments:
                raise ValueError(f"backbone.arguments must not hold '{argument}': {reason}.")
        if self.weights and self.initial_weights:
            raise ValueError(
                "backbone.weights and initial_weights both say how the weights begin. Leave one of them out."
            )
        return self


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects of an image: its side in pixels and the mean and deviation of each channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Backbone(nn.Module):
    """A timm model without its classifier: images (B, C, H, W) -> features (B, embed_dim)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.embed_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        # the layout of `create_backbone`: convolutions take a third of the time on CPUs, and less on GPUs too
        return self.model(images.contiguous(memory_format=torch.channels_last))


class TokenBackbone(Backbone):
    """A timm ViT, at any image size, that can also be entered and left at its tokens.

    The position table is learnt for `grid` patches and resampled for images of another size as DINO does it.
    """

    model: VisionTransformer

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__(model)
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.grid: Grid = model.patch_embed.grid_size
        self.num_prefix_tokens: int = model.num_prefix_tokens
        # position entries that belong to the class token and the registers
        self._num_prefix_positions = 0 if model.no_embed_class else model.num_prefix_tokens

    def embed(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> patch tokens with their positions (N, L, embed_dim), row by row."""
        height, width = images.shape[-2:]
        if (height % self.patch_size or width % self.patch_size) and not self.model.patch_embed.dynamic_img_pad:
            raise ValueError(
                f"image sides must be multiples of the patch size {self.patch_size}. Got {height}x{width}."
            )
        tokens = self.model.patch_embed(images)  # (N, rows, columns, D)
        rows, columns = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        if self.model.pos_embed is None:
            return tokens
        positions = self.model.pos_embed[:, self._num_prefix_positions :]
        return tokens + resample_positions(positions, self.grid, (rows, columns))

    def embed_patches(self, patches: Tensor, places: Tensor) -> Tensor:
        """Some patches (N, K, p * p * C) of images of the backbone's own size -> their tokens (N, K, embed_dim).

        patches: pixels in the order of `patchify`. places: (N, K), where in its image each patch is, counted by rows.
        The tokens are those of `embed`.
        """
        projection = self.model.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # pixels in the order row, column, channel
        tokens = self.model.patch_embed.norm(F.linear(patches, weight, projection.bias))
        if self.model.pos_embed is None:
            return tokens
        positions = self.model.pos_embed[:, self._num_prefix_positions :]
        return tokens + take_patches(positions.expand(len(patches), -1, -1), places)

    def encode(self, tokens: Tensor) -> Tensor:
        """Patch tokens (N, L, D), all or some of them -> encoded and normalised (N, 1 + L, D), class token first.

        A model with registers puts them after the class token, one without class token leaves it out: there are
        `num_prefix_tokens` before the patches.
        """
        model = self.model
        prefix: list[Tensor] = [token for token in (model.cls_token, model.reg_token) if token is not None]
        if prefix:
            prefix_tokens = torch.cat(prefix, dim=1)
            if self._num_prefix_positions and model.pos_embed is not None:
                prefix_tokens = prefix_tokens + model.pos_embed[:, : self._num_prefix_positions]
            tokens = torch.cat([prefix_tokens.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = model.norm_pre(model.patch_drop(model.pos_drop(tokens)))
        choose_attention(model.blocks, tokens)
        if model.grad_checkpointing and torch.is_grad_enabled():
            return model.norm(checkpoint_seq(model.blocks, tokens))
        return model.norm(model.blocks(tokens))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `torch.nn.Module.compile`; also for those who enter and leave at the tokens."""
        super().compile(*args, **kwargs)
        self.model.blocks.compile(*args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.encode(self.embed(images)), pre_logits=True)


def create_backbone(config: BackboneConfig) -> Backbone:
    """The backbone that `config` describes; TokenBackbone for ViTs. Raises ConfigError for a mistake in it."""
    if not timm.is_model(config.name):
        raise ConfigError(f"No timm model '{config.name}'.{nearest(config.name, timm.list_models())}")
    weights_file = _is_file(config.weights)
    if config.small_images and config.weights and not weights_file:
        raise ConfigError(
            "backbone.small_images replaces the stem that pretrained weights need. Leave one of them out."
        )
    model = _create_model(config, tag=None if weights_file else config.weights)
    if config.small_images:
        _shrink_stem(model, config.name)
    if type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed:
        backbone: Backbone = TokenBackbone(model)
    else:  # subclasses and hybrids have forward passes of their own
        backbone = Backbone(model.to(memory_format=torch.channels_last))
    if weights_file:
        load_weights(backbone.model, Path(str(config.weights)))
    _prepare_vit(backbone, config)
    if config.checkpoint_activations:
        _checkpoint_activations(backbone, config.name)
    return backbone


def without_drop_path(module: nn.Module) -> None:
    """Switch stochastic depth off for good, as a teacher needs it."""
    for part in module.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0


def save_backbone(directory: Path, backbone: Backbone, config: BackboneConfig, preprocessing: Preprocessing) -> None:
    """Write backbone.json and backbone.safetensors, for timm.create_model(name, num_classes=0, **arguments)."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.model.state_dict().items()}
    description: dict[str, JSON] = {
        "name": config.name,
        "arguments": config.arguments,
        "small_images": config.small_images,
        "size": preprocessing.size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / "backbone.safetensors", safetensors.torch.save(state, metadata={"format": "pt"}))
    write_json(directory / "backbone.json", description)


def load_backbone(directory: Path) -> tuple[Backbone, BackboneConfig, Preprocessing]:
    """The backbone that `save_backbone` wrote into a directory, with its description."""
    path = directory / "backbone.json"
    try:
        description = json.loads(path.read_bytes())
        config = BackboneConfig(**{key: description[key] for key in ("name", "arguments", "small_images")})
        preprocessing = Preprocessing(description["size"], tuple(description["mean"]), tuple(description["std"]))
    except FileNotFoundError:
        raise ConfigError(f"{directory} holds no backbone.json: is it the directory of a finished run?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no description of a backbone ({first_line(error)}).") from error
    backbone = create_backbone(config)
    load_weights(backbone.model, directory / "backbone.safetensors")
    return backbone, config, preprocessing


def _create_model(config: BackboneConfig, tag: str | None) -> nn.Module:
    name = config.name
    arguments: dict[str, Any] = dict(config.arguments)
    if tag is not None:
        name = f"{config.name.split('.')[0]}.{tag}"
        known = timm.list_pretrained(f"{config.name.split('.')[0]}.*")
        if name not in known:
            raise ConfigError(
                f"backbone.weights: no file and no pretrained '{name}'. Known: {', '.join(known) or 'none'}"
            )
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    try:
        try:
            return timm.create_model(name, tag is not None, num_classes=0, dynamic_img_size=True, **arguments)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            return timm.create_model(name, tag is not None, num_classes=0, **arguments)
    except Exception as error:  # whatever timm raises, the cause is in the config or the connection
        unwanted = next((argument for argument in config.arguments if f"'{argument}'" in str(error)), None)
        hint = f" backbone.arguments.{unwanted}=null leaves it out." if unwanted else ""
        raise ConfigError(f"timm cannot create '{name}': {first_line(error)}.{hint}") from error


def _prepare_vit(backbone: Backbone, config: BackboneConfig) -> None:
    """How the weights of a ViT begin and which of them stay as they are."""
    if config.initial_weights == "mae" and not isinstance(backbone, TokenBackbone):
        raise ConfigError(
            f"MAE needs a backbone with patch tokens (a ViT), and so does backbone.initial_weights=mae. "
            f"'{config.name}' has none."
        )
    for setting in ("initial_weights", "fixed_positions", "frozen_patch_embed"):
        if getattr(config, setting) and not isinstance(backbone, TokenBackbone):
            raise ConfigError(f"backbone.{setting} needs a ViT. '{config.name}' is none.")
    if isinstance(backbone, TokenBackbone):
        if config.initial_weights is not None:
            initialise(backbone.model, config.initial_weights)
        if config.fixed_positions:
            fix_positions(backbone.model)
        if config.frozen_patch_embed:
            backbone.model.patch_embed.requires_grad_(False)


def _checkpoint_activations(backbone: Backbone, name: str) -> None:
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in backbone.modules()):
        raise ConfigError(
            f"backbone.checkpoint_activations needs a network without batch norm, which would count each batch twice. "
            f"'{name}' has some."
        )
    try:
        backbone.model.set_grad_checkpointing()  # type: ignore[operator]
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"timm cannot checkpoint the activations of '{name}'.") from error


def _shrink_stem(model: nn.Module, name: str) -> None:
    if not (isinstance(model, ResNet) and isinstance(model.conv1, nn.Conv2d)):
        raise ConfigError(
            f"backbone.small_images needs a ResNet with a single stem convolution. '{name}' is none; try resnet18."
        )
    old = model.conv1
    stem = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm does
    model.add_module("conv1", stem)
    model.add_module("maxpool", nn.Identity())


def _is_file(weights: str | None) -> bool:
    return weights is not None and (weights.endswith(WEIGHT_SUFFIXES) or Path(weights).is_file())
