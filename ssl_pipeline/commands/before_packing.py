"""What is wrong with a run whatever its images are: reported before packing, and when settings are only shown."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Protocol, cast

import torch

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.backbones import Backbone, BackboneConfig, create_backbone, outline_backbone
from ssl_pipeline.config import RECIPES, Config, Value, launched_processes, load
from ssl_pipeline.data.shards.origins import display_name
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.methods import Method, MethodConfig, build_method
from ssl_pipeline.training.preflight import check_batch_norm, check_recipe
from ssl_pipeline.training.run import TrainConfig, checked_batch


class RunSettings(Protocol):
    """The settings of a run that are checked."""

    @property
    def images(self) -> str | None: ...
    @property
    def method(self) -> MethodConfig: ...
    @property
    def backbone(self) -> BackboneConfig: ...
    @property
    def augment(self) -> dict[str, ViewGroup]: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...


def check_outline(settings: RunSettings) -> None:
    """Raise ConfigError for a network, weights and views that do not fit together, as a run would.

    No image is read, nothing is fetched, and the network has no memory: about a second for one of any size.
    """
    backbone = outline_backbone(settings.backbone)
    with torch.device("meta"):
        method = build_method(settings.method, backbone)
    _check_method(settings, backbone, method)


def _check_method(settings: RunSettings, backbone: Backbone, method: Method) -> None:
    check_recipe(method, backbone, settings.augment, settings.data)
    check_batch_norm(method, settings.data, settings.train, num_processes=launched_processes())


def check_before_packing(
    schema: type[Config],
    arguments: Sequence[str],
    overrides: Mapping[str, Value] | None = None,
    *,
    num_images: int | None = None,
) -> None:
    """Raise ConfigError for settings that no run can have, weights that do not fit their network, and views that do not
    fit the method. num_images: how many there are at most, where that is known.
    """
    with redirect_stderr(io.StringIO()):  # the notes of this reading appear when the run reads them
        settings = cast(RunSettings, load(schema, arguments, recipes=RECIPES, overrides=overrides))
    backbone = create_backbone(settings.backbone)
    method = build_method(settings.method, backbone)
    _check_method(settings, backbone, method)
    if num_images:
        called = settings.images or display_name(settings.data.shards)
        checked_batch(num_images, settings.data, settings.train, num_processes=launched_processes(), called=called)
