"""Whether a recipe, its method and its images fit together: reported in one sentence before the first step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ssl_pipeline.augment.views import ViewGroup, check_crops_of
from ssl_pipeline.backbones import Backbone, TokenBackbone, check_image_sizes, smallest_size, starved_convolution
from ssl_pipeline.backbones.networks import batch_norms
from ssl_pipeline.batch import RunFacts, Views
from ssl_pipeline.config import ConfigError
from ssl_pipeline.config.ranges import plain
from ssl_pipeline.data.labelled import classes_with_labels
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.machine import free_host_bytes
from ssl_pipeline.methods.base import Method
from ssl_pipeline.training.run import TrainConfig

Augment = Mapping[str, ViewGroup]

MOST_CLASSES = 100_000  # that labels without names may count where there are fewer images


def check_recipe(method: Method, backbone: Backbone, augment: Augment, data: DataConfig) -> None:
    """Raises ConfigError if the recipe's views or labelled images are not what the method needs.

    Reads no image. Afterwards `forward` finds each group of `method.needs` as it asks for it.
    """
    name = type(method).__name__
    check_crops_of(augment)
    for needed in method.needs:
        _check_group(name, needed, augment)
    known = {needed.name for needed in method.needs}
    for given in augment:
        if given not in known:
            raise ConfigError(
                f"{name} does not use the view group augment.{given}. It reads {', '.join(sorted(known))}."
            )
    _check_sizes(method, backbone, augment)
    _check_masks(method, augment)
    _check_batch_fits(augment, data)
    reads_labelled = any(needed.labelled for needed in method.needs)
    if reads_labelled and data.labelled is None:
        raise ConfigError(
            f"{name} needs labelled images: set data.labelled.shards=DIR "
            "(python -m data_tools.split_labels makes them)."
        )
    if not reads_labelled and data.labelled is not None:
        raise ConfigError(f"{name} does not use data.labelled. Leave it out, or set data.labelled=null.")


def check_precision(
    method: Method, backbone: Backbone, augment: Augment, train: TrainConfig, device: torch.device
) -> None:
    """Raises ConfigError where the device's kernels get gradients wrong for views of these sizes.

    backbone: what the method is made of; a method that waits for the number of classes has none of its own yet.

    In bfloat16 on CPUs (torch 2.14) the gradient of a convolution with a stride that is given a single pixel
    holds memory that nothing was written to.
    """
    if train.precision != "bf16" or device.type != "cpu":
        return
    for group in dict.fromkeys(needed.name for needed in method.needs if needed.for_backbone):
        for size in augment[group].sizes if group in augment else ():
            name = starved_convolution(backbone, size)
            if name is not None:
                raise ConfigError(
                    f"augment.{group}.size={size} is too small for '{backbone.config.name}' with train.precision=bf16 "
                    f"on a CPU: its convolution {name} is left with one pixel, for which the CPU computes wrong "
                    f"gradients. Try augment.{group}.size={smallest_size(backbone, size)}, or train.precision=no."
                )


def _check_group(name: str, needed: Views, augment: Augment) -> None:
    group = augment.get(needed.name)
    if group is None:
        if needed.optional:
            return
        raise ConfigError(
            f"{name} needs the view group augment.{needed.name}. The recipe has {', '.join(augment) or 'none'}."
        )
    if needed.count is not None and group.count != needed.count:
        raise ConfigError(f"augment.{needed.name}.count must be {needed.count} for {name}. Got {group.count}.")
    if needed.crops_of is not None and group.crops_of != needed.crops_of:
        got = "none" if group.crops_of is None else f"'{group.crops_of}'"
        raise ConfigError(
            f"augment.{needed.name}.crops_of must be {needed.crops_of} for {name}, which compares the two. Got {got}."
        )


def _check_sizes(method: Method, backbone: Backbone, augment: Augment) -> None:
    """The patches of a mask must cover a view exactly, and the backbone must take the views that it is shown."""
    masked = {needed.name: needed.mask.patch_size for needed in method.needs if needed.mask is not None}
    shown = [needed.name for needed in method.needs if needed.for_backbone and needed.name in augment]
    for group, views in augment.items():
        for size in views.sizes:
            for patch_size in (_uncovering_patch(backbone, size) if group in shown else 1, masked.get(group, 1)):
                if size % patch_size:
                    nearest = max(1, round(size / patch_size)) * patch_size
                    raise ConfigError(
                        f"augment.{group}.size must be a multiple of the backbone's patch size {patch_size}. "
                        f"Got {size}; try {nearest}."
                    )
    _check_block_masks(method, augment)
    check_image_sizes(backbone, {f"augment.{group}.size": augment[group].sizes for group in dict.fromkeys(shown)})


def _check_block_masks(method: Method, augment: Augment) -> None:
    """The smallest block of a mask must be smaller than the grid of patches, in both directions."""
    for needed in method.needs:
        rule = needed.mask
        if rule is None or rule.kind != "blocks" or needed.name not in augment:
            continue
        block = round(rule.min_block**0.5)
        for size in augment[needed.name].sizes:
            side = size // rule.patch_size
            if side <= block:
                raise ConfigError(
                    f"augment.{needed.name}.size={size} is too small for masks in blocks: blocks of {rule.min_block} "
                    f"patches need a grid of more than {block} x {block} patches of {rule.patch_size} pixels. "
                    f"Got {side} x {side}; try larger views, a backbone with smaller patches, or smaller blocks."
                )


def _uncovering_patch(backbone: Backbone, size: int) -> int:
    """Side of the patches of a ViT that do not cover an image of this size, where it needs them to; else 1."""
    if isinstance(backbone, TokenBackbone) and size % backbone.patch_size:
        try:
            backbone.check_size(size, size)
        except ValueError:
            return backbone.patch_size
    return 1


def _check_masks(method: Method, augment: Augment) -> None:
    """A mask by its ratio must leave a patch of its views, and hide one at least where it hides the most."""
    keys = [f"method.{key}" for key in type(method).config_class.model_fields if key.endswith("mask_ratio")]
    setting = " or ".join(keys) or f"the mask ratio of {type(method).__name__}"
    for needed in method.needs:
        rule, group = needed.mask, augment.get(needed.name)
        if rule is None or rule.num_masked is not None or group is None:
            continue
        for size in group.sizes:
            num_patches = (size // rule.patch_size) ** 2
            most = rule.most_masked(num_patches)
            if not 0 < most < num_patches:
                ratio = max(rule.ratio) if isinstance(rule.ratio, tuple) else rule.ratio
                raise ConfigError(
                    f"{setting} must hide some of the {num_patches} patches of augment.{needed.name}.size={size} and "
                    f"leave some. Got {plain(ratio)}, which hides {most}; choose another, or larger views."
                )


def _check_batch_fits(augment: Augment, data: DataConfig) -> None:
    """Raises ConfigError if not even one batch of views, a byte per channel, fits into this process's memory."""
    pixels = sum(group.count * max(group.sizes) ** 2 for group in augment.values())
    needed, free = 3 * pixels * data.batch_size, free_host_bytes()
    if needed > free:
        views = " + ".join(f"{group.count} * {max(group.sizes)} px" for group in augment.values())
        raise ConfigError(
            f"One batch of views takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB of memory are free: "
            f"data.batch_size={data.batch_size} with views of {views}. Lower data.batch_size, or count or size of the "
            "views."
        )


def check_labels(method: Method, index: ShardIndex, data: DataConfig) -> None:
    """Raises ConfigError if the method learns the labels of all images, and some have none."""
    if any(needed.with_labels for needed in method.needs) and not index.has_labels:
        raise ConfigError(
            f"{type(method).__name__} learns the labels of all images, but {index.called} has some without one: "
            f"{index.label_problem()}. make_shards takes labels from class folders or from labels=FILE.csv; data.keep "
            "leaves images out, and data.labelled adds a labelled set to the others."
        )


def run_facts(
    index: ShardIndex,
    labelled: ShardIndex | None,
    augment: Augment,
    data: DataConfig,
    *,
    global_batch: int,
    micro_batch: int | None = None,
) -> RunFacts:
    """What `Method.prepare` is told; raises ConfigError for a label beyond the names of the classes, and for one class.

    labelled: the images whose labels the method learns, which may be `index` itself.
    """
    num_classes = names = None
    if labelled is not None:
        names, soft = labelled.class_names, labelled.num_soft_classes
        largest = int(labelled.labels().max()) if soft is None else soft - 1
        num_classes = largest + 1 if names is None else len(names)
        if names is None and soft is None and largest >= max(len(labelled), MOST_CLASSES):
            raise ConfigError(
                f"The {len(labelled):,} labelled images in {labelled.called} have labels up to {largest:,}; labels "
                "must count the classes from 0. Are they identifiers? make_shards labels=FILE.csv numbers classes."
            )
        if largest >= num_classes:
            raise ConfigError(
                f"The labelled images in {labelled.called} have label {largest}, but only {num_classes} classes have a "
                "name. Make the shards again, or fix the class names in their manifest."
            )
        _check_several_classes(labelled)
    sizes = {name: group.sizes for name, group in augment.items()}
    return RunFacts(
        len(index),
        num_classes,
        global_batch,
        sizes,
        data.mean,
        data.std,
        names,
        micro_batch,
        {name: group.mean for name, group in augment.items() if group.mean is not None},
        {name: group.std for name, group in augment.items() if group.std is not None},
    )


def _check_several_classes(labelled: ShardIndex) -> None:
    """Raises ConfigError if all labelled images are of one class, however many the shards or the settings name."""
    found = classes_with_labels(labelled)
    if len(found) < 2:
        names = labelled.class_names
        named = f" ({found[0] if names is None else names[found[0]]})" if found else ""
        raise ConfigError(
            f"The {len(labelled):,} labelled images in {labelled.called} are all of one class{named}; there must be "
            "two or more to tell apart. Label images of others too."
        )


def check_batch_norm(method: Method, data: DataConfig, train: TrainConfig, *, num_processes: int) -> None:
    """Raises ConfigError if a batch norm of the method would see one image at a time."""
    num_images = data.batch_size * (num_processes if train.sync_batch_norm else 1)
    if num_images == 1 and batch_norms(method):
        raise ConfigError(
            f"{type(method).__name__} with {method.backbone.config.name} has batch norm, which needs more than one "
            "image. Got data.batch_size=1; raise it, or set train.sync_batch_norm=true with several processes."
        )


def evaluation_size(method: Method, augment: Augment) -> int:
    """Side in pixels of the images that evaluators show the backbone, by `Views.evaluated`."""
    evaluated = next((needed for needed in method.needs if needed.evaluated), method.needs[0])
    return max(augment[evaluated.name].sizes)
