"""Colour jitter: torchvision's brightness, contrast, saturation and hue, in an order of each image's own."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from enum import IntEnum
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment.operations.base import (
    Operation,
    PerView,
    Probability,
    Strength,
    ViewSettings,
    happens,
    per_sample,
    per_view_mistakes,
)
from ssl_pipeline.augment.operations.grayscale import gray, mean_gray
from ssl_pipeline.config import InRange

# V views of each of B images; N: the same images, one view at a time; U uniforms in [0, 1), P draws


class Adjustment(IntEnum):
    """The parts of colour jitter, numbered as torchvision numbers them."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


class Uniform(IntEnum):
    """What each uniform decides; the last ones are the strengths of the four adjustments."""

    WHETHER = 0
    ORDER = 1
    STRENGTH = 2


class Draw(IntEnum):
    """Columns of the draws; TURN and FACTOR have one for each `Adjustment`."""

    WHETHER = 0  # 1 if the view is jittered
    TURN = 1  # when each adjustment is due: 0 first, 3 last
    FACTOR = 5  # of each adjustment; the hue's is a shift in turns of the colour circle


TURNS = np.array(list(itertools.permutations(range(len(Adjustment)))))


class JitterSettings(ViewSettings):
    """When and how much the colours of a view are changed."""

    jitter_prob: Probability = 0.8
    """Probability of colour jitter: brightness, contrast, saturation and hue in random order."""
    brightness: Strength = 0.4
    """Brightness factors are uniform in [max(0, 1 - x), 1 + x]."""
    contrast: Strength = 0.4
    """Contrast factors are uniform in [max(0, 1 - x), 1 + x]."""
    saturation: Strength = 0.2
    """Saturation factors are uniform in [max(0, 1 - x), 1 + x]."""
    hue: Annotated[PerView, InRange(ge=0, le=0.5)] = 0.1
    """Hue shifts are uniform in [-x, x] turns of the colour circle, x at most 0.5."""


class Jitter(Operation[JitterSettings, tuple[Adjustment, ...]]):
    """The adjustments of some strength, the setting, one after the other. Draws: see `Draw`."""

    settings = JitterSettings

    def mistakes(self, group: JitterSettings) -> list[str]:
        return per_view_mistakes(group, "jitter_prob", "brightness", "contrast", "saturation", "hue")

    def num_uniforms(self, group: JitterSettings) -> int:
        return Uniform.STRENGTH + len(Adjustment)

    def num_draws(self, group: JitterSettings) -> int:
        return Draw.FACTOR + len(Adjustment)

    def draw(self, uniforms_VBU: NDArray[np.float64], group: JitterSettings, *, size: int) -> NDArray[np.float32]:
        drawn_VBP = np.empty((*uniforms_VBU.shape[:2], self.num_draws(group)), np.float32)
        drawn_VBP[..., Draw.WHETHER] = happens(uniforms_VBU[..., Uniform.WHETHER], group, group.jitter_prob)
        order_VB = (uniforms_VBU[..., Uniform.ORDER] * len(TURNS)).astype(np.int64)
        drawn_VBP[..., Draw.TURN : Draw.FACTOR] = TURNS[order_VB]
        for adjustment, strengths in zip(Adjustment, _strengths(group), strict=True):
            strength_V1 = np.array(strengths)[:, None]
            low_V1, high_V1 = np.maximum(0, 1 - strength_V1), 1 + strength_V1
            if adjustment == Adjustment.HUE:
                low_V1, high_V1 = -strength_V1, strength_V1
            u_VB = uniforms_VBU[..., Uniform.STRENGTH + adjustment]
            drawn_VBP[..., Draw.FACTOR + adjustment] = low_V1 + (high_V1 - low_V1) * u_VB
        return drawn_VBP

    def setting(self, group: JitterSettings, view: int, *, size: int) -> tuple[Adjustment, ...] | None:
        if not group.per_view(group.jitter_prob)[view]:
            return None
        strong = (adjustment for adjustment, each in zip(Adjustment, _strengths(group), strict=True) if each[view])
        return tuple(strong) or None

    def alike(self, draws_NP: Tensor) -> Sequence[Hashable]:
        """The order of the adjustments; () for images that are not jittered."""
        return [tuple(turns) if jittered else () for jittered, *turns in draws_NP[:, : Draw.FACTOR].tolist()]

    def on_cpu(self, image_NCHW: Tensor, draws_NP: Tensor, setting: tuple[Adjustment, ...]) -> Tensor:
        jittered, *turns = draws_NP[0, : Draw.FACTOR].tolist()
        if jittered:
            for adjustment in sorted(setting, key=turns.__getitem__):
                _adjust(image_NCHW, adjustment, draws_NP[:, Draw.FACTOR + adjustment])
        return image_NCHW

    def on_accelerator(self, image_NCHW: Tensor, draws_NP: Tensor, setting: tuple[Adjustment, ...]) -> Tensor:
        """In two sweeps of pointwise work.

        Only contrast needs more than the pixel itself, the image's mean gray at its turn: the first sweep runs what
        comes before contrast, to find that mean; the second runs everything.
        """
        mean_N111 = torch.zeros_like(image_NCHW[:, :1, :1, :1])
        if Adjustment.CONTRAST in setting:
            contrast_turn_N = draws_NP[:, Draw.TURN + Adjustment.CONTRAST]
            before_NCHW = _sweep(image_NCHW, draws_NP, mean_N111, end_N=contrast_turn_N, adjustments=setting)
            mean_N111 = mean_gray(before_NCHW)
        end_N = torch.full_like(draws_NP[:, Draw.TURN], len(Adjustment))
        jittered_NCHW = _sweep(image_NCHW, draws_NP, mean_N111, end_N=end_N, adjustments=setting)
        return torch.where(per_sample(draws_NP[:, Draw.WHETHER]) > 0, jittered_NCHW, image_NCHW)


def _strengths(group: JitterSettings) -> tuple[tuple[float, ...], ...]:
    """Of each adjustment, one strength per view."""
    brightness, contrast, saturation, hue = group.brightness, group.contrast, group.saturation, group.hue
    return tuple(group.per_view(strength) for strength in (brightness, contrast, saturation, hue))


def _adjust(image_NCHW: Tensor, adjustment: Adjustment, factor_N: Tensor) -> None:
    """One adjustment, in place."""
    factor = float(factor_N) if len(factor_N) == 1 else per_sample(factor_N)  # a number is faster
    if adjustment == Adjustment.BRIGHTNESS:
        brighten(image_NCHW, factor, out=image_NCHW)
    elif adjustment == Adjustment.HUE:
        shift_hue(image_NCHW, factor, out=image_NCHW)
    else:
        target = mean_gray if adjustment == Adjustment.CONTRAST else gray
        blend(image_NCHW, target(image_NCHW), factor, out=image_NCHW)


def _sweep(
    image_NCHW: Tensor, draws_NP: Tensor, mean_N111: Tensor, *, end_N: Tensor, adjustments: tuple[Adjustment, ...]
) -> Tensor:
    """What is due before `end_N`: hue, which costs most, is computed once, the blends on both sides of it."""
    hue_turn_N = draws_NP[:, Draw.TURN + Adjustment.HUE]
    for turn in (0, 1, 2):
        due_N = (turn < hue_turn_N) & (turn < end_N)
        image_NCHW = _blend_due(image_NCHW, draws_NP, mean_N111, turn=turn, due_N=due_N)
    if Adjustment.HUE in adjustments:
        shifted_NCHW = shift_hue(image_NCHW, per_sample(draws_NP[:, Draw.FACTOR + Adjustment.HUE]))
        image_NCHW = torch.where(per_sample(hue_turn_N < end_N), shifted_NCHW, image_NCHW)
    for turn in (1, 2, 3):
        due_N = (turn > hue_turn_N) & (turn < end_N)
        image_NCHW = _blend_due(image_NCHW, draws_NP, mean_N111, turn=turn, due_N=due_N)
    return image_NCHW


def _blend_due(image_NCHW: Tensor, draws_NP: Tensor, mean_N111: Tensor, *, turn: int, due_N: Tensor) -> Tensor:
    """Brightness, contrast or saturation, whichever has this turn; samples that are not due stay as they are."""
    factor_N111 = torch.ones_like(mean_N111)
    target_N1HW = torch.zeros_like(mean_N111)
    for adjustment, its_target in (
        (Adjustment.BRIGHTNESS, target_N1HW),
        (Adjustment.CONTRAST, mean_N111),
        (Adjustment.SATURATION, gray(image_NCHW)),
    ):
        now_N111 = per_sample(due_N & (draws_NP[:, Draw.TURN + adjustment] == turn))
        factor_N111 = torch.where(now_N111, per_sample(draws_NP[:, Draw.FACTOR + adjustment]), factor_N111)
        target_N1HW = torch.where(now_N111, its_target, target_N1HW)
    return blend(image_NCHW, target_N1HW, factor_N111)


def brighten(image_NCHW: Tensor, factor: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    """factor * image, kept in [0, 1]. With `out` it is written there, which may be the image itself, as below."""
    return torch.mul(image_NCHW, factor, out=out).clamp_(0, 1)


def blend(image_NCHW: Tensor, target: Tensor, factor: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    """factor * image + (1 - factor) * target, kept in [0, 1]."""
    rest = target * (1 - factor)
    return torch.mul(image_NCHW, factor, out=out).add_(rest).clamp_(0, 1)


def shift_hue(image_NCHW: Tensor, shift: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    """Turn the hue by `shift` of the colour circle; the lowest channel and the chroma (highest - lowest) stay.

    With the hue h in [0, 6) from red over green and blue, |h| = 1 + (green + blue - red - low) / chroma on the side of
    green, and 6 minus that on the side of blue. Back, a channel is low + chroma * w with w going up from 0 to 1 and
    down again, each within a sixth: for red up from h = 4 and down from 1, green 0 and 3, blue 2 and 5. A piece of w is
    the difference of two clamps. (Choosing by the largest channel and taking a remainder made it 3 to 4 times slower on
    a CPU.)
    """
    red, green, blue = image_NCHW.split(1, dim=1)
    low = torch.minimum(red, green).minimum(blue)
    chroma = torch.maximum(red, green).maximum(blue).sub_(low)
    # a gray pixel has no hue; its dividend is 0, and any positive divisor will do
    turn = (green - red).add_(blue).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1).mul_(1 / 6)
    turn = torch.copysign(turn, green - blue).add_(shift + 1).frac_()  # h / 6
    high, deep = low.add(chroma, alpha=3), low.sub_(chroma, alpha=2)  # what the clamps' lower ends add up to
    channels = []
    for channel, (base, up, down) in enumerate(((deep, 4, 1), (high, 0, 3), (high, 2, 5))):
        weight = turn.clamp(up / 6, (up + 1) / 6).sub_(turn.clamp(down / 6, (down + 1) / 6))
        into = None if out is None else out[:, channel : channel + 1]
        channels.append(torch.addcmul(base, chroma, weight, value=6, out=into))
    return torch.cat(channels, dim=1) if out is None else out
