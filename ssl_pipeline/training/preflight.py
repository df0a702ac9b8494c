"""Whether a recipe, its method and its images fit together: told before the first step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.methods.base import Method


def check_view_groups(method: Method, augment: Mapping[str, ViewGroup]) -> None:
    """Raises ConfigError if a recipe lacks a group of views that the method reads, or has one that it does not."""
    name = type(method).__name__
    for needed in (*method.view_groups, *method.labelled_view_groups):
        if needed not in augment:
            raise ConfigError(
                f"{name} needs the view group augment.{needed}. The recipe has {', '.join(augment) or 'none'}."
            )
    for group, count in method.view_counts.items():
        if augment[group].count != count:
            raise ConfigError(f"augment.{group}.count must be {count} for {name}. Got {augment[group].count}.")
    known = {*method.view_groups, *method.optional_view_groups, *method.labelled_view_groups}
    for given in augment:
        if given not in known:
            raise ConfigError(
                f"{name} has no use for the view group augment.{given}. It reads {', '.join(sorted(known))}."
            )


def check_labelled_settings(method: Method, data: DataConfig, *, measures_classifier: bool) -> None:
    """Raises ConfigError if a method lacks the labelled images that it needs, or is given what it has no use for."""
    name = type(method).__name__
    if method.labelled_view_groups and data.labelled is None:
        raise ConfigError(
            f"{name} needs labelled images: set data.labelled.shards=DIR "
            "(python -m data_tools.split_labels makes them)."
        )
    if not method.labelled_view_groups and data.labelled is not None:
        raise ConfigError(f"{name} has no use for data.labelled. Leave it out, or set data.labelled=null.")
    if method.classifier is None and measures_classifier:
        raise ConfigError(f"{name} learns no classifier to measure. Leave classifier out; knn suits any method.")


def open_labelled_images(method: Method, data: DataConfig) -> ShardIndex | None:
    """The labelled images of a semi-supervised method; ConfigError if a label is missing or beyond its classes."""
    if data.labelled is None:
        return None
    shards = data.labelled.shards
    index = open_shards(shards, cache_dir=data.cache_dir, cache_gb=data.cache_gb)
    if not index.has_labels:
        raise ConfigError(f"data.labelled.shards={shards} has images without labels; all of them need one.")
    if index.class_names is not None and len(index.class_names) != method.num_classes:
        raise ConfigError(
            f"method.num_classes must be the number of classes of data.labelled.shards={shards}, "
            f"{len(index.class_names)}. Got {method.num_classes}."
        )
    largest = int(index.labels().max())
    if largest >= method.num_classes:
        raise ConfigError(
            f"method.num_classes={method.num_classes} is too small: data.labelled.shards={shards} has label {largest}."
        )
    return index


def check_batch_norm(
    method: Method, data: DataConfig, *, backbone: str, sync_batch_norm: bool, num_processes: int
) -> None:
    """Raises ConfigError if a batch norm of the method would see one image at a time."""
    num_images = data.batch_size * (num_processes if sync_batch_norm else 1)
    if num_images == 1 and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in method.modules()):
        raise ConfigError(
            f"{type(method).__name__} with {backbone} has batch norm, which needs more than one image. "
            "Got data.batch_size=1; raise it, or set train.sync_batch_norm=true with several processes."
        )
