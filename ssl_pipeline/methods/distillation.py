"""Distillation of a frozen network's features: of the image, and of each patch.

The targets are the features themselves, as in FitNets (Romero et al., 2014, https://arxiv.org/abs/1412.6550) and
AM-RADIO (Ranzinger et al., 2023, https://arxiv.org/abs/2312.06709). DINOv3 (Simeoni et al., 2025,
https://arxiv.org/abs/2508.10104) distils through its teacher's prototype heads, which are not published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline.backbones import (
    ARCHITECTURE,
    Backbone,
    BackboneConfig,
    Preprocessing,
    TokenBackbone,
    create_backbone,
    errors_name_setting,
    load_backbone,
)
from ssl_pipeline.backbones.known import known_of
from ssl_pipeline.backbones.tokens.base import TimmModel
from ssl_pipeline.backbones.weights.sources import is_tag
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config, ConfigError, Depth, Width
from ssl_pipeline.losses import feature_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.heads import MLPHead, projector_dims
from ssl_pipeline.modules.teacher import Snapshot
from ssl_pipeline.optim.rules import ParamRule, layer_decay_rules
from ssl_pipeline.schedule import Progress

Distance = Literal["cosine", "mse", "smooth_l1"]


class DistillationConfig(Config):
    """Distillation: a student learns to say of an image, and of its patches, what a frozen teacher says."""

    name: Literal["distillation"]
    teacher: BackboneConfig
    """The network that is distilled, with its weights: a run's directory, a file or a pretrained tag of timm's."""
    class_weight: float = Field(1.0, gt=0)
    """Weight of the loss on the features of an image: the class token, or what the networks pool."""
    patch_weight: float = Field(1.0, ge=0)
    """Weight of the loss on the features of patches (a CNN: of the places of its last map); 0 leaves it out."""
    class_distance: Distance = "cosine"
    """What the loss on the features of an image measures."""
    patch_distance: Distance = "cosine"
    """What the loss on the features of patches measures."""
    projector_layers: Depth = 1
    """Linear layers from the student's width to the teacher's, separately for images and for patches."""
    projector_hidden_dim: Width = 2048
    """Width of the projectors' hidden layers."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from one block of a ViT to the one before it."""
    patch_embed_lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate of a ViT's patch embedding."""

    @model_validator(mode="after")
    def _teacher_is_trained(self) -> DistillationConfig:
        if self.teacher.weights is None:
            raise ValueError(
                "teacher.weights is missing: a trained network is distilled. Set a run's directory, a file, or the "
                "tag of a pretrained timm model."
            )
        return self


class Distillation(Method):
    """Any student with linear maps to the width of a frozen teacher; the teacher's map is resampled to its grid.

    The teacher sees the student's views, or with a group `teacher` the same crops at a size and normalisation of its
    own. Its weights are read by `prepare`.
    """

    config_class = DistillationConfig
    needs = (Views("image"), Views("teacher", optional=True, crops_of="image", for_backbone=False))

    teacher: Snapshot[Backbone]

    def __init__(self, config: DistillationConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.student = backbone
        with errors_name_setting("method.teacher"), torch.device("meta"):  # only for its widths
            teacher = create_backbone(config.teacher.model_copy(update={"weights": None}))
        self.class_projector = self._projector(backbone.embed_dim, teacher.embed_dim)
        if config.patch_weight:
            self.patch_projector = self._projector(_map_dim(backbone), _map_dim(teacher))

    def prepare(self, facts: RunFacts) -> None:
        with errors_name_setting("method.teacher"):
            teacher, source, expected = load_teacher(self.config.teacher)
        group = "teacher" if "teacher" in facts.view_sizes else "image"
        for network, its_group, setting in ((self.student, "image", "backbone"), (teacher, group, "method.teacher")):
            for size in facts.view_sizes[its_group]:
                if isinstance(network, TokenBackbone):
                    network.require_size(size, group=its_group, setting=setting)
                elif self.config.patch_weight:
                    network.map_shape(size)  # refuses networks without one
        if expected is not None:
            facts.require_normalisation(group, expected.mean, expected.std, why="The teacher was trained on")
        self.teacher = Snapshot(teacher, source=source)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        images = batch.views["image"].flatten(0, 1)
        seen_by_teacher = batch.views.get("teacher", batch.views["image"]).flatten(0, 1)
        config, metrics = self.config, {}
        if not config.patch_weight:
            with torch.no_grad():
                targets_ND = self.teacher.network(seen_by_teacher)
            features = self.student(images)
        else:
            with torch.no_grad():
                targets_ND, target_map = self.teacher.network.features_and_map(seen_by_teacher)
            features, student_map = self.student.features_and_map(images)
        projected_ND = self.class_projector(features)
        loss = config.class_weight * feature_loss(projected_ND, targets_ND, distance=config.class_distance)
        metrics["class_cosine"] = mean_cosine(projected_ND, targets_ND)
        if config.patch_weight:
            targets_NLD = rows_of(resampled(target_map, (student_map.shape[2], student_map.shape[3])))
            projected_NLD = self.patch_projector(rows_of(student_map))
            patch_loss = feature_loss(projected_NLD, targets_NLD, distance=config.patch_distance)
            loss = loss + config.patch_weight * patch_loss
            metrics["patch_cosine"] = mean_cosine(projected_NLD, targets_NLD)
        return StepOutput(loss, {**metrics, "feature_std": feature_std(features.detach(), progress)})

    def backbones(self) -> dict[str, Backbone]:
        return {"student": self.student}

    def parts_to_compile(self) -> list[nn.Module]:
        return [self.student, self.teacher.network]

    def param_rules(self) -> tuple[ParamRule, ...]:
        decay, patch_embed_scale = self.config.layer_decay, self.config.patch_embed_lr_scale
        if decay == patch_embed_scale == 1:
            return ()
        return layer_decay_rules(self.student, "student.", decay=decay, patch_embed_scale=patch_embed_scale)

    def _projector(self, in_dim: int, out_dim: int) -> MLPHead:
        config = self.config
        dims = projector_dims(in_dim, config.projector_hidden_dim, out_dim, num_layers=config.projector_layers)
        return MLPHead(dims, batch_norm=False, bias=True, last_bias=True)


def load_teacher(config: BackboneConfig) -> tuple[Backbone, Path | str, Preprocessing | None]:
    """A trained network, where its weights came from, and what it expects of images where that is known.

    Raises ConfigError if a run's network is another one than `config` says.
    """
    source = Path(str(config.weights)).expanduser()
    if (source / "backbone.json").is_file() and config.weights_from is None:
        teacher, preprocessing = load_backbone(source)
        there, here = (given.model_dump(include=set(ARCHITECTURE)) for given in (teacher.config, config))
        if there != here:
            raise ConfigError(
                f"method.teacher must be the network of {source}: {there}. Got {here}. Set name, arguments and "
                "small_images to match."
            )
        return teacher, source / "backbone.safetensors", preprocessing
    teacher = create_backbone(config)
    known = known_of(
        str(config.weights), name=config.name if is_tag(str(config.weights)) else None, which=config.weights_from
    )
    network: TimmModel = teacher.model
    size = known.size or network.pretrained_cfg["input_size"][1]
    expected: Preprocessing | None = None
    if known.mean is not None and known.std is not None:
        mean, std = ((values[0], values[1], values[2]) for values in (known.mean, known.std))
        expected = Preprocessing(size, mean, std)
    return teacher, source if source.is_file() else str(source), expected


def resampled(map_NDRC: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map on another grid, bilinear, over all that a new place covers where it has fewer."""
    if map_NDRC.shape[2:] == grid:
        return map_NDRC
    exact = map_NDRC.to(torch.promote_types(map_NDRC.dtype, torch.float32))
    return F.interpolate(exact, size=grid, mode="bilinear", antialias=True)


def rows_of(map_NDRC: Tensor) -> Tensor:
    """(N, D, rows, columns) -> (N, L, D), row by row."""
    return map_NDRC.flatten(2).transpose(1, 2)


def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean cosine of rows, without gradient: how much has been learnt, 1 for all."""
    return F.cosine_similarity(student.detach().float(), teacher.float(), dim=-1).mean()


def _map_dim(backbone: Backbone) -> int:
    network: TimmModel = backbone.model
    return backbone.token_dim if isinstance(backbone, TokenBackbone) else network.num_features
