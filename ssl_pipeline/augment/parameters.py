"""What the host decides about the colours of each view: the stages of its group, and the parameters drawn for it."""

from __future__ import annotations

import itertools
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from ssl_pipeline.augment.views import ViewGroup

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
