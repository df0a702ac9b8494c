"""What a recipe may ask of a group of views, and the random numbers that one view of one image consumes."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Literal

from pydantic import model_validator

from ssl_pipeline.config import Config

PerView = float | tuple[float, ...]
"""One value for all views of a group, or one per view."""


class Uniform(IntEnum):
    """Where each of the UNIFORMS_PER_VIEW uniforms in [0, 1) of a view goes: the crop's part, then the colours'."""

    CROP_AREA = 0  # one for each of the CROP_TRIES tries
    CROP_ASPECT = 10  # likewise
    CROP_TOP = 20  # the position is drawn once: it plays no part in whether a try fits
    CROP_LEFT = 21
    FLIP = 22
    JITTER = 23
    ORDER = 24
    BRIGHTNESS = 25
    CONTRAST = 26
    SATURATION = 27
    HUE = 28
    GRAY = 29
    BLUR = 30
    BLUR_SIGMA = 31
    SOLARIZE = 32


CROP_TRIES = 10
UNIFORMS_PER_VIEW = 33
UNIFORMS_PER_ROUND = 2  # of RandAugment: the operation and its magnitude; they follow those of `Uniform`
CUTOUT_UNIFORMS = 3  # side, row and column; the last ones


class ViewGroup(Config):
    """Views of one size and how they are made: crop, flip, colour jitter, grayscale, blur, solarize, RandAugment and
    cutout, in this order.

    The defaults are the official DINO's for a view without blur. Whatever takes a probability or a jitter strength
    takes one value, or one per view. Without any of them (`jitter_prob`, `gray_prob`, ... 0) a view is only normalised.

    RandAugment is FixMatch's: each operation one of identity, brightness, colour, contrast, sharpness (all 0.05 to
    0.95), rotation (30 degrees to either side), shear and translation in x and y (0.3 to either side), posterize (4 to
    7 bits), solarize (any threshold), autocontrast and equalize, all equally likely, with a magnitude uniform in its
    range; Pillow's operations on 8-bit images, with the nearest pixel and black where the image runs out.
    """

    count: int = 1
    """Number of views of each image."""
    size: int
    """Height and width of a view in pixels."""
    crop: Literal["random_resized", "pad"] = "random_resized"
    """random_resized: a random part of the image, resized. pad: the whole image, shifted by up to `padding` of its
    size and reflected where it runs out (FixMatch's weak view)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random_resized crop, as a fraction of the image."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random_resized crop."""
    padding: float = 0.125
    """Largest shift of a pad crop, as a fraction of the image's size."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized; both are antialiased."""
    flip_prob: PerView = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: PerView = 0.8
    """Probability of colour jitter: brightness, contrast, saturation and hue in random order."""
    brightness: PerView = 0.4
    """Brightness factors are uniform in [max(0, 1 - x), 1 + x]."""
    contrast: PerView = 0.4
    """Contrast factors are uniform in [max(0, 1 - x), 1 + x]."""
    saturation: PerView = 0.2
    """Saturation factors are uniform in [max(0, 1 - x), 1 + x]."""
    hue: PerView = 0.1
    """Hue shifts are uniform in [-x, x] turns of the colour circle, x at most 0.5."""
    gray_prob: PerView = 0.2
    """Probability of grayscale."""
    blur_prob: PerView = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels."""
    blur_kernel: int | None = None
    """Odd width of the blur's kernel in pixels; by default 4 standard deviations of the strongest blur to each side."""
    solarize_prob: PerView = 0.0
    """Probability of solarization: values from the threshold on are inverted."""
    solarize_threshold: float = 128 / 255
    """Where solarization starts; 0 is black, 1 white."""
    rand_augment: int = 0
    """Random operations one after the other, each of random magnitude: identity, brightness, colour, contrast,
    sharpness, rotate, shear, translate, posterize, solarize, autocontrast, equalize (FixMatch)."""
    cutout: tuple[float, float] = (0.0, 0.0)
    """Smallest and largest side of a gray square at a random place, as a fraction of the view."""

    @model_validator(mode="after")
    def _check(self) -> ViewGroup:
        mistakes = [*self._per_view_mistakes(), *self._range_mistakes()]
        if mistakes:
            raise ValueError(" ".join(mistakes))
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides that a view may have."""
        return (self.size,)

    def per_view(self, value: PerView) -> tuple[float, ...]:
        """One value for each of the `count` views."""
        values = value if isinstance(value, tuple) else (value,)
        return values * self.count if len(values) == 1 else values

    def num_uniforms(self) -> int:
        """How many uniforms one view of one image consumes."""
        return UNIFORMS_PER_VIEW + UNIFORMS_PER_ROUND * self.rand_augment + CUTOUT_UNIFORMS * (self.cutout[1] > 0)

    def blur_kernel_size(self) -> int:
        """Width of the blur's kernel in pixels, at most what reflecting a view of this size allows."""
        if self.blur_kernel is not None:
            return self.blur_kernel
        return min(2 * math.ceil(4 * self.blur_sigma[1]) + 1, 2 * self.size - 1)

    def _per_view_mistakes(self) -> list[str]:
        probabilities = ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob")
        highest = dict.fromkeys(probabilities, 1.0) | {"hue": 0.5}
        mistakes = []
        for name in (*probabilities, "brightness", "contrast", "saturation", "hue"):
            value: PerView = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if len(values) not in (1, self.count):
                mistakes.append(
                    f"{name} must have one value or one per view (count={self.count}). Got {len(values)} values."
                )
            high = highest.get(name, math.inf)
            needed = f"between 0 and {high:g}" if high < math.inf else "0 or more"
            wrong = [number for number in values if not 0 <= number <= high]
            mistakes += [f"{name} must be {needed}. Got {number:g}." for number in wrong]
        return mistakes

    def _range_mistakes(self) -> list[str]:
        largest_kernel = 2 * self.size - 1
        kernel = self.blur_kernel if self.blur_kernel is not None else 1
        checks = (
            (self.count >= 1, "count", "at least 1", self.count),
            (self.size >= 1, "size", "at least 1 pixel", self.size),
            (0 < self.scale[0] <= self.scale[1] <= 1, "scale", "an increasing pair in (0, 1]", self.scale),
            (0 < self.aspect[0] <= self.aspect[1], "aspect", "an increasing pair above 0", self.aspect),
            (0 <= self.padding <= 0.5, "padding", "between 0 and 0.5", self.padding),
            (
                0 < self.blur_sigma[0] <= self.blur_sigma[1],
                "blur_sigma",
                "an increasing pair above 0",
                self.blur_sigma,
            ),
            (
                kernel % 2 == 1 and 1 <= kernel <= max(largest_kernel, 1),
                "blur_kernel",
                f"odd and from 1 to {largest_kernel} for size={self.size}",
                kernel,
            ),
            (0 <= self.solarize_threshold <= 1, "solarize_threshold", "between 0 and 1", self.solarize_threshold),
            (self.rand_augment >= 0, "rand_augment", "0 or more", self.rand_augment),
            (0 <= self.cutout[0] <= self.cutout[1] <= 1, "cutout", "an increasing pair in [0, 1]", self.cutout),
        )
        return [f"{name} must be {needed}. Got {got}." for holds, name, needed, got in checks if not holds]
