"""Grayscale, with torchvision's weights of the channels."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.augment.operations.base import ByChance, Probability, ViewSettings, change_due, per_sample


class GrayscaleSettings(ViewSettings):
    """When a view becomes gray."""

    gray_prob: Probability = 0.2
    """Probability of grayscale."""


class Grayscale(ByChance[GrayscaleSettings, bool]):
    """All channels become the luma."""

    settings = GrayscaleSettings
    probability, draws_if_off = "gray_prob", True

    def setting(self, group: GrayscaleSettings, view: int, *, size: int) -> bool | None:
        return self.probabilities(group)[view] > 0 or None

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
