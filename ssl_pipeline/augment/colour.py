"""Colour operations on a batch of images in [0, 1], (N,3,H,W): torchvision's, each sample with its own factor.

With `out` an operation writes there; that may be the image itself, which keeps a small batch in a CPU's cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

# N samples, C channels (3, or 1 for gray), S pixels to a side, R + 1 distances from 0 to the kernel's reach

SIGMAS_THAT_COUNT = 4.75  # a Gaussian's weights beyond are 2 millionths of the whole


def per_sample(values_N: Tensor) -> Tensor:
    """(N,) -> (N,1,1,1), which multiplies images."""
    return values_N[:, None, None, None]


def gray(image_NCHW: Tensor) -> Tensor:
    """(N,3,H,W) -> (N,1,H,W) luma with torchvision's weights."""
    red, green, blue = image_NCHW.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def mean_gray(image_NCHW: Tensor) -> Tensor:
    """(N,3,H,W) -> (N,1,1,1) the mean of `gray`, which is the gray of the channels' means."""
    return gray(image_NCHW.mean(dim=(2, 3), keepdim=True))


def brighten(image_NCHW: Tensor, factor: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    """factor * image, kept in [0, 1]."""
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


def solarize(image_NCHW: Tensor, threshold: float, *, out: Tensor | None = None) -> Tensor:
    """Invert from the threshold on; the weight is 0 or 1, for which lerp is exact (and on a CPU 2 times `where`)."""
    return torch.lerp(image_NCHW, 1 - image_NCHW, (image_NCHW >= threshold).to(image_NCHW.dtype), out=out)
