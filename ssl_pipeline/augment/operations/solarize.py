"""Solarization: values from a threshold on are inverted."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.augment.operations.base import ByChance, Probability, ViewSettings, change_due, per_sample


class SolarizeSettings(ViewSettings):
    """When and from where on a view is solarized."""

    solarize_prob: Probability = 0.0
    """Probability of solarization: values from the threshold on are inverted."""
    solarize_threshold: float = Field(128 / 255, ge=0, le=1)
    """Where solarization starts; 0 is black, 1 white."""


class Solarize(ByChance[SolarizeSettings, float]):
    """Values from the threshold, the setting, on are inverted."""

    settings = SolarizeSettings
    probability, draws_if_off = "solarize_prob", True

    def setting(self, group: SolarizeSettings, view: int, *, size: int) -> float | None:
        return group.solarize_threshold if self.probabilities(group)[view] > 0 else None

    def on_cpu(self, image_NCHW: Tensor, draws_NP: Tensor, setting: float) -> Tensor:
        def change(part_NCHW: Tensor, _: Tensor) -> Tensor:
            return solarize(part_NCHW, setting, out=part_NCHW)

        return change_due(image_NCHW, draws_NP, draws_NP[:, 0] > 0, change)

    def on_accelerator(self, image_NCHW: Tensor, draws_NP: Tensor, setting: float) -> Tensor:
        return torch.where(per_sample(draws_NP[:, 0]) > 0, solarize(image_NCHW, setting), image_NCHW)


def solarize(image_NCHW: Tensor, threshold: float, *, out: Tensor | None = None) -> Tensor:
    """Invert from the threshold on; the weight is 0 or 1, for which lerp is exact (and on a CPU 2 times `where`)."""
    return torch.lerp(image_NCHW, 1 - image_NCHW, (image_NCHW >= threshold).to(image_NCHW.dtype), out=out)
