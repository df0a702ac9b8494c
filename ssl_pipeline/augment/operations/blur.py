"""Gaussian blur, with torchvision's kernel; each image has its own standard deviation."""

from __future__ import annotations

import math
from typing import Annotated

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

SIGMAS_THAT_COUNT = 4.75  # a Gaussian's weights beyond are 2 millionths of the whole


class BlurSettings(ViewSettings):
    """When and how much a view is blurred."""

    blur_prob: Probability = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: Annotated[tuple[float, float], InRange(gt=0, le=1000, increasing=True)] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels."""
    blur_kernel: Annotated[int | None, InRange(ge=1, le=8191)] = None
    """Odd width of the blur's kernel in pixels; by default 4 standard deviations of the strongest blur to each side."""

    def blur_kernel_size(self, size: int) -> int:
        """Width of the kernel in pixels, at most what reflecting a view of this size allows."""
        if self.blur_kernel is not None:
            return self.blur_kernel
        return min(2 * math.ceil(4 * self.blur_sigma[1]) + 1, largest_kernel(size))


class Blur(Operation[BlurSettings, int]):
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

    def setting(self, group: BlurSettings, view: int, *, size: int) -> int | None:
        return group.blur_kernel_size(size) if group.per_view(group.blur_prob)[view] > 0 else None

    def on_cpu(self, image_NCHW: Tensor, draws_NP: Tensor, setting: int) -> Tensor:
        def change(part_NCHW: Tensor, part_NP: Tensor) -> Tensor:
            return blur_by_matrices(part_NCHW, part_NP[:, 0], setting, out=part_NCHW)

        return change_due(image_NCHW, draws_NP, draws_NP[:, 0] > 0, change)

    def on_accelerator(self, image_NCHW: Tensor, draws_NP: Tensor, setting: int) -> Tensor:
        return blur(image_NCHW, draws_NP[:, 0].clamp(min=1e-3), setting)  # so narrow that the kernel is 0 1 0


def largest_kernel(size: int) -> int:
    """What reflecting a view of this size without repeating its edge allows."""
    return max(2 * size - 1, 1)


def blur(image_NCHW: Tensor, sigma_N: Tensor, kernel: int) -> Tensor:
    """Gaussian blur of each sample with its own sigma, columns then rows, reflected without repeating the edge.

    Tap by tap, so that neither TF32 nor autocast rounds it as they would a convolution or a matrix product; a compiler
    makes one kernel of each direction.
    """
    reach = kernel // 2
    weights_NR = gaussian(sigma_N, reach)
    for axis, padding in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        size = image_NCHW.shape[axis]
        padded_NCHW = pad(image_NCHW, padding, mode="reflect")
        image_NCHW = padded_NCHW.narrow(axis, reach, size) * per_sample(weights_NR[:, 0])
        for distance in range(1, reach + 1):
            weight_N111 = per_sample(weights_NR[:, distance])
            image_NCHW.addcmul_(padded_NCHW.narrow(axis, reach - distance, size), weight_N111)
            image_NCHW.addcmul_(padded_NCHW.narrow(axis, reach + distance, size), weight_N111)
    return image_NCHW


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
