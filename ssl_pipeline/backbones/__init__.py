"""The networks that are pretrained: any timm model by name, turned into features."""

from __future__ import annotations

from ssl_pipeline.backbones.classifier import NormalisedLinear, classifier_of_run, load_classifier, save_classifier
from ssl_pipeline.backbones.config import ARCHITECTURE, Argument, BackboneConfig, errors_name_setting
from ssl_pipeline.backbones.create import create_backbone, outline_backbone
from ssl_pipeline.backbones.files import load_backbone, save_backbone
from ssl_pipeline.backbones.image_sizes import check_image_sizes, smallest_size, starved_convolution
from ssl_pipeline.backbones.layer_decay import layer_decay_groups, layer_lr_scale
from ssl_pipeline.backbones.layers import Layers, layers_of
from ssl_pipeline.backbones.networks import (
    Backbone,
    TokenBackbone,
    require_tokens,
    without_drop_path,
)
from ssl_pipeline.backbones.positions import sincos_position_embedding  # whose public place is here
from ssl_pipeline.backbones.preprocessing import ImageTransform, Preprocessing
from ssl_pipeline.backbones.runs import BackboneOfRun, load_from_checkpoint, load_run
from ssl_pipeline.backbones.tokens import Tokens

__all__ = [
    "ARCHITECTURE",
    "Argument",
    "Backbone",
    "BackboneConfig",
    "BackboneOfRun",
    "ImageTransform",
    "Layers",
    "NormalisedLinear",
    "Preprocessing",
    "TokenBackbone",
    "Tokens",
    "check_image_sizes",
    "classifier_of_run",
    "create_backbone",
    "errors_name_setting",
    "layer_decay_groups",
    "layer_lr_scale",
    "layers_of",
    "load_backbone",
    "load_classifier",
    "load_from_checkpoint",
    "load_run",
    "outline_backbone",
    "require_tokens",
    "save_backbone",
    "save_classifier",
    "sincos_position_embedding",
    "smallest_size",
    "starved_convolution",
    "without_drop_path",
]
