"""Grayscale, with torchvision's weights of the channels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment.operations.base import (
    Operation,
    Probability,
    ViewSettings,
    change_due,
    happens,
    per_sample,
    per_view_mistakes,
)


class GrayscaleSettings(ViewSettings):
    """When a view becomes gray."""

    gray_prob: Probability = 0.2
    """Probability of grayscale."""


class Grayscale(Operation[GrayscaleSettings, bool]):
    """All channels become the luma. Draws: 1 if the view becomes gray."""

    settings = GrayscaleSettings

    def mistakes(self, group: GrayscaleSettings) -> list[str]:
        return per_view_mistakes(group, "gray_prob")

    def num_uniforms(self, group: GrayscaleSettings) -> int:
        return 1

    def num_draws(self, group: GrayscaleSettings) -> int:
        return 1

    def draw(self, uniforms_VBU: NDArray[np.float64], group: GrayscaleSettings, *, size: int) -> NDArray[np.float32]:
        return happens(uniforms_VBU[..., 0], group, group.gray_prob)[..., None].astype(np.float32)

    def setting(self, group: GrayscaleSettings, view: int, *, size: int) -> bool | None:
        return group.per_view(group.gray_prob)[view] > 0 or None

    def on_cpu(self, image_NCHW: Tensor, draws_NP: Tensor, setting: bool) -> Tensor:
        return change_due(image_NCHW, draws_NP, draws_NP[:, 0] > 0, lambda part_NCHW, _: gray(part_NCHW))

    def on_accelerator(self, image_NCHW: Tensor, draws_NP: Tensor, setting: bool) -> Tensor:
        return torch.where(per_sample(draws_NP[:, 0]) > 0, gray(image_NCHW), image_NCHW)


def gray(image_NCHW: Tensor) -> Tensor:
    """(N,3,H,W) -> (N,1,H,W) luma with torchvision's weights."""
    red, green, blue = image_NCHW.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def mean_gray(image_NCHW: Tensor) -> Tensor:
    """(N,3,H,W) -> (N,1,1,1) the mean of `gray`, which is the gray of the channels' means."""
    return gray(image_NCHW.mean(dim=(2, 3), keepdim=True))
