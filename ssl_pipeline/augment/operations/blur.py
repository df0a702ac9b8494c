"""Gaussian blur, with torchvision's kernel or as Pillow's three boxes; each image has its own standard deviation."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from ssl_pipeline.augment.operations.base import (
    Operation,
    Probability,
    ViewSettings,
    change_due,
    happens,
    per_sample,
    per_view_mistakes,
    range_mistakes,
)
from ssl_pipeline.config import InRange

# N samples, C channels (3, or 1 for gray), S pixels to a side, R + 1 distances from 0 to the kernel's reach

HALF = 0.49997  # of a level: Pillow cuts the weights of its boxes to 24 bits, so that what lies halfway is rounded down
SIGMAS_THAT_COUNT = 4.75  # a Gaussian's weights beyond are 2 millionths of the whole


class BlurSettings(ViewSettings):
    """When and how much a view is blurred."""

    blur_prob: Probability = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: Annotated[tuple[float, float], InRange(gt=0, le=1000, increasing=True)] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels."""
    blur_kernel: Annotated[int | None, InRange(ge=1, le=8191)] = None
    """Odd width of the blur's kernel in pixels; by default 4 standard deviations of the strongest blur to each side."""
    blur: Literal["gaussian", "box"] = "gaussian"
    """How a view is blurred: `gaussian` as torchvision does it, or `box` as Pillow approximates it (three boxes each
    way, the edge repeated), as do the official DINO, MoCo, SimSiam, Barlow Twins and VICReg."""

    def blur_kernel_size(self, size: int) -> int:
        """Width of the kernel in pixels, at most what reflecting a view of this size allows."""
        if self.blur_kernel is not None:
            return self.blur_kernel
        return min(2 * math.ceil(4 * self.blur_sigma[1]) + 1, largest_kernel(size))


class Kernel(NamedTuple):
    """Which blur, and the width of its kernel in pixels; of a box blur that of one box."""

    kind: Literal["gaussian", "box"]
    width: int


class Blur(Operation[BlurSettings, Kernel]):
    """Gaussian blur with a kernel as wide as the setting. Draws: sigma in pixels, 0 if the view is not blurred."""

    settings = BlurSettings

    def mistakes(self, group: BlurSettings) -> list[str]:
        kernel = 1 if group.blur_kernel is None else group.blur_kernel
        smallest = min(group.sizes, default=1)
        largest = largest_kernel(smallest)
        return [
            *per_view_mistakes(group, "blur_prob"),
            *range_mistakes(
                (
                    kernel % 2 == 1 and kernel <= largest,
                    "blur_kernel",
                    f"odd and from 1 to {largest} for size={smallest}",
                    kernel,
                ),
                (
                    group.blur == "gaussian" or group.blur_kernel is None,
                    "blur_kernel",
                    "left out with blur=box",
                    kernel,
                ),
            ),
        ]

    def num_uniforms(self, group: BlurSettings) -> int:
        return 2

    def num_draws(self, group: BlurSettings) -> int:
        return 1

    def draw(self, uniforms_VBU: NDArray[np.float64], group: BlurSettings, *, size: int) -> NDArray[np.float32]:
        low, high = group.blur_sigma
        blurred_VB = happens(uniforms_VBU[..., 0], group, group.blur_prob)
        sigma_VB = np.where(blurred_VB, low + (high - low) * uniforms_VBU[..., 1], 0)
        return sigma_VB[..., None].astype(np.float32)

    def setting(self, group: BlurSettings, view: int, *, size: int) -> Kernel | None:
        if group.per_view(group.blur_prob)[view] == 0:
            return None
        width = group.blur_kernel_size(size) if group.blur == "gaussian" else box_width(group.blur_sigma[1])
        return Kernel(group.blur, width)

    def on_cpu(self, image_NCHW: Tensor, draws_NP: Tensor, setting: Kernel) -> Tensor:
        def change(part_NCHW: Tensor, part_NP: Tensor) -> Tensor:
            if setting.kind == "box":
                return box_blur(part_NCHW, part_NP[:, 0], setting.width)
            return blur_by_matrices(part_NCHW, part_NP[:, 0], setting.width, out=part_NCHW)

        return change_due(image_NCHW, draws_NP, draws_NP[:, 0] > 0, change)

    def on_accelerator(self, image_NCHW: Tensor, draws_NP: Tensor, setting: Kernel) -> Tensor:
        if setting.kind == "box":
            return box_blur(image_NCHW, draws_NP[:, 0], setting.width)
        return blur(image_NCHW, draws_NP[:, 0].clamp(min=1e-3), setting.width)  # so narrow that the kernel is 0 1 0


def largest_kernel(size: int) -> int:
    """What reflecting a view of this size without repeating its edge allows."""
    return max(2 * size - 1, 1)


def blur(image_NCHW: Tensor, sigma_N: Tensor, kernel: int) -> Tensor:
    """Gaussian blur of each sample with its own sigma, columns then rows, reflected without repeating the edge.

    Tap by tap, so that neither TF32 nor autocast rounds it as they would a convolution or a matrix product; a compiler
    makes one kernel of each direction.
    """
    weights_NR = gaussian(sigma_N, kernel // 2)
    for axis in (2, 3):
        image_NCHW = _tap_by_tap(image_NCHW, weights_NR, axis=axis, edge="reflect")
    return image_NCHW


def box_blur(image_NCHW: Tensor, sigma_N: Tensor, width: int) -> Tensor:
    """Pillow's GaussianBlur(radius=sigma) of each sample; sigma 0 changes nothing.

    Three boxes along the rows, then three along the columns, each with the edge repeated. Pillow rounds to 8 bits after
    each, so that a weak blur changes little or nothing; so does this, and its result is Pillow's.
    """
    weights_NR = box(sigma_N, width // 2)
    levels_NCHW = (image_NCHW * 255).round()
    for axis in (3, 3, 3, 2, 2, 2):
        levels_NCHW = _tap_by_tap(levels_NCHW, weights_NR, axis=axis, edge="replicate").add_(HALF).floor_()
    return torch.where(per_sample(sigma_N) > 0, levels_NCHW / 255, image_NCHW)


def _tap_by_tap(image_NCHW: Tensor, weights_NR: Tensor, *, axis: int, edge: str) -> Tensor:
    """Each sample smoothed along one axis by its own weights of the distances from 0."""
    reach, size = weights_NR.shape[1] - 1, image_NCHW.shape[axis]
    padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
    padded_NCHW = pad(image_NCHW, padding, mode=edge)
    smoothed_NCHW = padded_NCHW.narrow(axis, reach, size) * per_sample(weights_NR[:, 0])
    for distance in range(1, reach + 1):
        weight_N111 = per_sample(weights_NR[:, distance])
        smoothed_NCHW.addcmul_(padded_NCHW.narrow(axis, reach - distance, size), weight_N111)
        smoothed_NCHW.addcmul_(padded_NCHW.narrow(axis, reach + distance, size), weight_N111)
    return smoothed_NCHW


def blur_by_matrices(image_NCSS: Tensor, sigma_N: Tensor, kernel: int, *, out: Tensor) -> Tensor:
    """`blur` as two matrix products, 2 to 6 times as fast on a CPU, where they are true to float32."""
    samples, channels, size, _ = image_NCSS.shape
    band_NSS = _blur_matrices(sigma_N, kernel, size)
    rows_NCSS = torch.bmm(image_NCSS.reshape(samples, channels * size, size), band_NSS.mT).view_as(image_NCSS)
    for channel in range(channels):
        torch.bmm(band_NSS, rows_NCSS[:, channel], out=out[:, channel])
    return out


def _blur_matrices(sigma_N: Tensor, kernel: int, size: int) -> Tensor:
    """(N,S,S): row s holds the weights of the pixels that pixel s is made of, those out of the image reflected."""
    reach = min(kernel // 2, math.ceil(SIGMAS_THAT_COUNT * float(sigma_N.max())))
    wide = size + 2 * reach
    half_NR = gaussian(sigma_N, reach)
    weights_NK = torch.cat([half_NR[:, 1:].flip(1), half_NR], dim=1)
    band_NSW = weights_NK.new_zeros(len(sigma_N), size, wide)
    # each row's weights begin one pixel further right
    rows_NSK = band_NSW.as_strided((len(sigma_N), size, 2 * reach + 1), (size * wide, wide + 1, 1))
    rows_NSK.copy_(weights_NK[:, None].expand_as(rows_NSK))
    inside_NSS = band_NSW[:, :, reach : reach + size]
    inside_NSS[:, :, 1 : reach + 1] += band_NSW[:, :, :reach].flip(2)
    inside_NSS[:, :, size - 1 - reach : size - 1] += band_NSW[:, :, reach + size :].flip(2)
    return inside_NSS


def gaussian(sigma_N: Tensor, reach: int) -> Tensor:
    """(N,R): weight of a pixel at each distance from 0 to `reach`; the centre and twice the others sum to 1."""
    distance_R = torch.arange(reach + 1, device=sigma_N.device)
    weights_NR = torch.exp(-0.5 * (distance_R / sigma_N[:, None]) ** 2)
    weights_NR = torch.where(weights_NR > 1e-30, weights_NR, 0)  # a CPU is slow with what is nearly zero
    return weights_NR / (2 * weights_NR.sum(dim=1, keepdim=True) - 1)


def box_width(sigma: float) -> int:
    """Width in pixels of one of three boxes that make a blur of this strength, its fractional ends included."""
    return 2 * int((math.sqrt(4 * sigma**2 + 1) - 1) / 2) + 3


def box(sigma_N: Tensor, reach: int) -> Tensor:
    """(N,R): weights of one of three boxes by distance (Gwosdek et al., 2011, extended box filters; Pillow's).

    With the variance v = sigma^2 / 3 of a box, its whole radius is l = floor((sqrt(12 v + 1) - 1) / 2), and the pixels
    at distance l + 1 count a = (2 l + 1) (l (l + 1) - 3 v) / (6 (v - (l + 1)^2)) of a pixel; the box is divided by its
    length 2 (l + a) + 1.
    """
    variance_N = sigma_N.square() / 3
    whole_N = ((12 * variance_N + 1).sqrt().sub(1) / 2).floor()
    following_N = whole_N + 1
    part_N = (2 * whole_N + 1) * (whole_N * following_N - 3 * variance_N) / (6 * (variance_N - following_N.square()))
    distance_R = torch.arange(reach + 1, device=sigma_N.device)
    weights_NR = (distance_R <= whole_N[:, None]) + part_N[:, None] * (distance_R == following_N[:, None])
    return weights_NR / (2 * (whole_N + part_N) + 1)[:, None]
