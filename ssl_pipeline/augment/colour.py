"""Colour operations on a batch of images in [0, 1], (N,3,H,W): torchvision's, each sample with its own factor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def per_sample(values_N: Tensor) -> Tensor:
    """(N,) -> (N,1,1,1), which multiplies images."""
    return values_N[:, None, None, None]


def gray(image_NCHW: Tensor) -> Tensor:
    """(N,3,H,W) -> (N,1,H,W) luma with torchvision's weights."""
    red, green, blue = image_NCHW.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def blend(image_NCHW: Tensor, target: Tensor, factor_N111: Tensor) -> Tensor:
    """factor * image + (1 - factor) * target, kept in [0, 1]."""
    return (image_NCHW * factor_N111).add_(target * (1 - factor_N111)).clamp_(0, 1)


def shift_hue(image_NCHW: Tensor, shift_N111: Tensor) -> Tensor:
    """Turn the hue by `shift` of the colour circle; the lowest channel and the chroma (highest - lowest) stay.

    With the hue h in [0, 6) from red over green and blue, |h| = 1 + (green + blue - red - low) / chroma on the side of
    green, and 6 minus that on the side of blue. Back, a channel is low + chroma * clamp(w, 0, 1), where w is
    |h - 3| - 1 for red, 2 - |h - 2| for green, 2 - |h - 4| for blue. (Choosing by the largest channel and taking a
    remainder made it 3 to 4 times slower on a CPU.)
    """
    red, green, blue = image_NCHW.split(1, dim=1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue) - low
    # a gray pixel has no hue; its dividend is 0, and any positive divisor will do
    hue = ((green - low) + (blue - red)).div_(chroma.clamp(min=1e-12)).add_(1)
    hue = torch.copysign(hue, green - blue).add_(6 * shift_N111)
    hue = hue.sub_(torch.floor(hue / 6), alpha=6)
    weights = ((hue - 3).abs_().sub_(1), (hue - 2).abs_().neg_().add_(2), (hue - 4).abs_().neg_().add_(2))
    return torch.cat([torch.addcmul(low, chroma, weight.clamp_(0, 1)) for weight in weights], dim=1)


def blur(image_NCHW: Tensor, sigma_N: Tensor, kernel: int) -> Tensor:
    """Gaussian blur of each sample with its own sigma, columns then rows, reflected without repeating the edge.

    Tap by tap, so that neither TF32 nor autocast rounds it as they would a convolution or a matrix product; on a CPU
    these two took 1 to 4 times as long (0.7 to 1.2 times at 32 pixels).
    """
    reach = kernel // 2
    distance_R = torch.arange(reach + 1, device=sigma_N.device)
    weights_NR = torch.exp(-0.5 * (distance_R / sigma_N[:, None]) ** 2)
    weights_NR = weights_NR / (2 * weights_NR.sum(dim=1, keepdim=True) - 1)  # the centre counts once, the rest twice
    for axis, padding in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        size = image_NCHW.shape[axis]
        padded_NCHW = pad(image_NCHW, padding, mode="reflect")
        image_NCHW = padded_NCHW.narrow(axis, reach, size) * per_sample(weights_NR[:, 0])
        for distance in range(1, reach + 1):
            weight_N111 = per_sample(weights_NR[:, distance])
            image_NCHW.addcmul_(padded_NCHW.narrow(axis, reach - distance, size), weight_N111)
            image_NCHW.addcmul_(padded_NCHW.narrow(axis, reach + distance, size), weight_N111)
    return image_NCHW


def solarize(image_NCHW: Tensor, threshold: float) -> Tensor:
    """Invert from the threshold on; the weight is 0 or 1, for which lerp is exact (and on a CPU 2 times `where`)."""
    return image_NCHW.lerp(1 - image_NCHW, (image_NCHW >= threshold).to(image_NCHW.dtype))
