"""What the host decides about the colours of each view: the stages of its group, and the parameters drawn for it."""

from __future__ import annotations

import itertools
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.augment.rand_augment import draw_rand_augment
from ssl_pipeline.augment.views import UNIFORMS_PER_VIEW, Uniform, ViewGroup

# V views of each of B images, U uniforms in [0, 1), P parameters


class Parameter(IntEnum):
    """The NUM_PARAMETERS columns of one view's parameters; TURN and FACTOR have one for each `Operation`.

    Those of RandAugment and cutout follow, where a group has them.
    """

    JITTER = 0  # 1 if the view is jittered
    TURN = 1  # when each operation is due: 0 first, 3 last
    FACTOR = 5  # of each operation; the hue's is a shift in turns of the colour circle
    GRAY = 9  # 1 if the view becomes gray
    BLUR_SIGMA = 10  # in pixels; 0 if the view is not blurred
    SOLARIZE = 11  # 1 if the view is solarized


NUM_PARAMETERS = 12


class Operation(IntEnum):
    """The operations of colour jitter, numbered as torchvision numbers them."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


Channels = tuple[float, float, float]  # of red, green and blue
TURNS = np.array(list(itertools.permutations(range(len(Operation)))))


def draw_parameters(uniforms_VBU: NDArray[np.float64], group: ViewGroup) -> NDArray[np.float32]:
    """The parameters of each view from uniforms in [0, 1); runs on the host.

    (V,B,NUM_PARAMETERS), followed by those of `draw_rand_augment` if the group has RandAugment or cutout.
    """
    assert uniforms_VBU.shape[0] == group.count
    assert uniforms_VBU.shape[2] == group.num_uniforms()
    drawn_VBP = np.empty((*uniforms_VBU.shape[:2], NUM_PARAMETERS), np.float32)

    def between(uniform: Uniform, low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
        return low + (high - low) * uniforms_VBU[..., uniform]

    for column, uniform, probability in (
        (Parameter.JITTER, Uniform.JITTER, group.jitter_prob),
        (Parameter.GRAY, Uniform.GRAY, group.gray_prob),
        (Parameter.SOLARIZE, Uniform.SOLARIZE, group.solarize_prob),
    ):
        drawn_VBP[..., column] = uniforms_VBU[..., uniform] < np.array(group.per_view(probability))[:, None]
    for operation, uniform, strength in (
        (Operation.BRIGHTNESS, Uniform.BRIGHTNESS, group.brightness),
        (Operation.CONTRAST, Uniform.CONTRAST, group.contrast),
        (Operation.SATURATION, Uniform.SATURATION, group.saturation),
    ):
        strength_V1 = np.array(group.per_view(strength))[:, None]
        factor_VB = between(uniform, np.maximum(0, 1 - strength_V1), 1 + strength_V1)
        drawn_VBP[..., Parameter.FACTOR + operation] = factor_VB
    hue_V1 = np.array(group.per_view(group.hue))[:, None]
    drawn_VBP[..., Parameter.FACTOR + Operation.HUE] = between(Uniform.HUE, -hue_V1, hue_V1)

    order_VB = (uniforms_VBU[..., Uniform.ORDER] * len(TURNS)).astype(np.int64)
    drawn_VBP[..., Parameter.TURN : Parameter.TURN + len(Operation)] = TURNS[order_VB]
    blurred = uniforms_VBU[..., Uniform.BLUR] < np.array(group.per_view(group.blur_prob))[:, None]
    sigma = between(Uniform.BLUR_SIGMA, *(np.array(bound) for bound in group.blur_sigma))
    drawn_VBP[..., Parameter.BLUR_SIGMA] = np.where(blurred, sigma, 0)
    return np.concatenate((drawn_VBP, draw_rand_augment(uniforms_VBU[..., UNIFORMS_PER_VIEW:], group)), axis=-1)


class Stages(NamedTuple):
    """What can happen to one view of a group at all; the rest is skipped without looking at the parameters."""

    operations: tuple[Operation, ...]
    gray: bool
    blur_kernel: int  # 0: no blur
    solarize: bool
    solarize_threshold: float
    rand_augment: int  # rounds
    cutout: bool
    factor: Channels  # of the normalisation: value * factor + offset, which is (value - mean) / std to rounding
    offset: Channels


def stages_per_view(group: ViewGroup, *, mean: Channels, std: Channels) -> list[Stages]:
    """The stages of each view of the group: those of some probability, jitter operations of some strength."""
    (mean_red, mean_green, mean_blue), (red, green, blue) = mean, std
    strengths = zip(*map(group.per_view, (group.brightness, group.contrast, group.saturation, group.hue)), strict=True)
    return [
        Stages(
            operations=tuple(op for op, strength in zip(Operation, view, strict=True) if strength and jitter),
            gray=gray > 0,
            blur_kernel=group.blur_kernel_size() if blur else 0,
            solarize=solarize > 0,
            solarize_threshold=group.solarize_threshold,
            rand_augment=group.rand_augment,
            cutout=group.cutout[1] > 0,
            factor=(1 / red, 1 / green, 1 / blue),
            offset=(-mean_red / red, -mean_green / green, -mean_blue / blue),
        )
        for view, jitter, gray, blur, solarize in zip(
            strengths,
            *map(group.per_view, (group.jitter_prob, group.gray_prob, group.blur_prob, group.solarize_prob)),
            strict=True,
        )
    ]
