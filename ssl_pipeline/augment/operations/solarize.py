"""Solarization: values from a threshold on are inverted."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
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


class SolarizeSettings(ViewSettings):
    """When and from where on a view is solarized."""

    solarize_prob: Probability = 0.0
    """Probability of solarization: values from the threshold on are inverted."""
    solarize_threshold: float = Field(128 / 255, ge=0, le=1)
    """Where solarization starts; 0 is black, 1 white."""


class Solarize(Operation[SolarizeSettings, float]):
    """Values from the threshold, the setting, on are inverted. Draws: 1 if the view is solarized."""

    settings = SolarizeSettings

    def mistakes(self, group: SolarizeSettings) -> list[str]:
        return per_view_mistakes(group, "solarize_prob")

    def num_uniforms(self, group: SolarizeSettings) -> int:
        return 1

    def num_draws(self, group: SolarizeSettings) -> int:
        return 1

    def draw(self, uniforms_VBU: NDArray[np.float64], group: SolarizeSettings, *, size: int) -> NDArray[np.float32]:
        return happens(uniforms_VBU[..., 0], group, group.solarize_prob)[..., None].astype(np.float32)

    def setting(self, group: SolarizeSettings, view: int, *, size: int) -> float | None:
        return group.solarize_threshold if group.per_view(group.solarize_prob)[view] > 0 else None

    def on_cpu(self, image_NCHW: Tensor, draws_NP: Tensor, setting: float) -> Tensor:
        def change(part_NCHW: Tensor, _: Tensor) -> Tensor:
            return solarize(part_NCHW, setting, out=part_NCHW)

        return change_due(image_NCHW, draws_NP, draws_NP[:, 0] > 0, change)

    def on_accelerator(self, image_NCHW: Tensor, draws_NP: Tensor, setting: float) -> Tensor:
        return torch.where(per_sample(draws_NP[:, 0]) > 0, solarize(image_NCHW, setting), image_NCHW)


def solarize(image_NCHW: Tensor, threshold: float, *, out: Tensor | None = None) -> Tensor:
    """Invert from the threshold on; the weight is 0 or 1, for which lerp is exact (and on a CPU 2 times `where`)."""
    return torch.lerp(image_NCHW, 1 - image_NCHW, (image_NCHW >= threshold).to(image_NCHW.dtype), out=out)
