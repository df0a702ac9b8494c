"""The colours of a batch on its own device: the operations of a group of views, then the normalisation.

Each sample gets exactly what torchvision's functional float operations would give it, one at a time and in its own
order (Pillow's semantics, to rounding), from numbers that the host drew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ssl_pipeline.augment.on_accelerator import augment_on_accelerator, fused
from ssl_pipeline.augment.on_cpu import augment_on_cpu
from ssl_pipeline.augment.operations.base import Channels, Stage, Stages
from ssl_pipeline.augment.views import ViewGroup

# V views of each of B images, C channels; N: the same images, one view at a time; P draws


@torch.no_grad()
def apply_photometric(
    crops_VBCHW: Tensor,
    draws_VBP: Tensor,
    group: ViewGroup,
    *,
    mean: Channels,
    std: Channels,
    compile: bool = False,
) -> Tensor:
    """Crops, 8 bits or floats in [0, 255] -> float32 views of the same shape, augmented and normalised, where they are.

    In this order: the group's operations, (value - mean) / std; values are in [0, 1] up to the last. Equals
    torchvision's functional operations (RandAugment: Pillow's) applied one sample at a time to within 1e-5. On an
    accelerator nothing waits for the device: every operation runs on all samples and those that it concerns take its
    result; on CUDA `compile` makes a few kernels of it, once for each kind of view, where torch.compile works. On a CPU
    only these samples are computed, as few at a time as its cache holds.
    """
    device = crops_VBCHW.device
    views_VBCHW = torch.empty(crops_VBCHW.shape, dtype=torch.float32, device=device)
    with torch.autocast(device.type, enabled=False):
        first = 0
        per_view = stages_per_view(group, size=crops_VBCHW.shape[-1], mean=mean, std=std)
        for stages, same in itertools.groupby(per_view):
            views = slice(first, first := first + len(list(same)))
            crops_NCHW, draws_NP = crops_VBCHW[views].flatten(0, 1), draws_VBP[views].flatten(0, 1)
            views_NCHW = views_VBCHW[views].flatten(0, 1)
            if device.type == "cpu":
                augment_on_cpu(crops_NCHW, draws_NP, stages, out=views_NCHW)
            else:
                augment = fused() if compile and device.type == "cuda" else augment_on_accelerator
                views_NCHW.copy_(augment(crops_NCHW, draws_NP, stages))
    return views_VBCHW


def stages_per_view(group: ViewGroup, *, size: int, mean: Channels, std: Channels) -> list[Stages]:
    """What can happen to each view of the group, if it is `size` pixels wide."""
    (mean_red, mean_green, mean_blue), (red, green, blue) = mean, std
    factor, offset = (1 / red, 1 / green, 1 / blue), (-mean_red / red, -mean_green / green, -mean_blue / blue)
    return [Stages(tuple(_stages_of(group, view, size)), factor, offset) for view in range(group.count)]


def _stages_of(group: ViewGroup, view: int, size: int) -> Iterator[Stage]:
    first = 0
    for operation in group.operations:
        end = first + operation.num_draws(group)
        setting = operation.setting(group, view, size=size)
        if setting is not None:
            yield Stage(operation, setting, first, end)
        first = end
