"""Five corruptions at five severities, one or two of each family of ImageNet-C, made of 8-bit pixels as they come.

Hendrycks & Dietterich (2019, https://arxiv.org/abs/1903.12261): noise, blur, weather (brightness) and digital
(contrast, JPEG). The strengths are those of ImageNet-C, and of CIFAR-10-C for images of up to 64 pixels; the code is
our own. What is random depends only on (seed, image).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, pad

from ssl_pipeline.randomness import NOISE, hash64

Corruption = Literal["gaussian_noise", "defocus_blur", "brightness", "contrast", "jpeg"]
CORRUPTIONS: tuple[Corruption, ...] = ("gaussian_noise", "defocus_blur", "brightness", "contrast", "jpeg")
SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64  # pixels up to which the strengths are CIFAR-10-C's

Strength = float | tuple[float, float]

IMAGENET_C: dict[Corruption, tuple[Strength, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # deviation, of colours in [0, 1]
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius, deviation of its edge; pixels
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the largest colour
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # of the distance to the mean
    "jpeg": (25, 18, 15, 10, 7),  # quality
}
CIFAR10_C: dict[Corruption, tuple[Strength, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "jpeg": (80, 65, 58, 50, 40),
}

# Axes: B images of 3 colours C, H x W pixels.


def strengths_for(size: int) -> tuple[str, dict[Corruption, tuple[Strength, ...]]]:
    """The name and the strengths of the benchmark for images of this side."""
    return ("CIFAR-10-C", CIFAR10_C) if size <= SMALL_SIDE else ("ImageNet-C", IMAGENET_C)


@dataclass(frozen=True)
class Corrupt:
    """One corruption of one strength, as a change of the feature pass's pixels: 8 bits in and out."""

    corruption: Corruption
    strength: Strength
    seed: int = 0

    def __call__(self, pixels_BCHW: Tensor, ids_B: Tensor, device: torch.device) -> Tensor:
        strength = self.strength
        if self.corruption == "jpeg":
            assert not isinstance(strength, tuple)
            return jpeg(pixels_BCHW, quality=int(strength)).to(device)
        colours = pixels_BCHW.to(device).float() / 255
        if isinstance(strength, tuple):
            corrupted = defocus_blur(colours, radius=strength[0], edge=strength[1])
        elif self.corruption == "gaussian_noise":
            corrupted = colours + strength * noise_like(pixels_BCHW, ids_B, seed=self.seed).to(device)
        else:
            change: Callable[[Tensor, float], Tensor] = brightness if self.corruption == "brightness" else contrast
            corrupted = change(colours, strength)
        return (corrupted.clamp(0, 1) * 255).to(torch.uint8)  # cut off, as the stored benchmarks are


def noise_like(pixels_BCHW: Tensor, ids_B: Tensor, *, seed: int) -> Tensor:
    """Standard normal numbers of the same shape; those of an image are its own in any batch."""
    noise = torch.empty(pixels_BCHW.shape)
    for image_CHW, number in zip(noise, ids_B.tolist(), strict=True):
        generator = torch.Generator().manual_seed(int(hash64(seed, NOISE, number)))
        image_CHW.normal_(generator=generator)
    return noise


def defocus_blur(colours_BCHW: Tensor, *, radius: float, edge: float) -> Tensor:
    """The mean over a disk of pixels around each, whose edge is softened; images are reflected at their borders."""
    kernel_HW = disk(radius, edge).to(colours_BCHW.device)
    half = len(kernel_HW) // 2
    padded = colours_BCHW
    while half > 0:  # a reflection reaches no further than the image does
        step = min(half, padded.shape[-1] - 1, padded.shape[-2] - 1)
        padded, half = pad(padded, (step, step, step, step), mode="reflect"), half - step
    channels = padded.shape[1]
    return conv2d(padded, kernel_HW.expand(channels, 1, -1, -1), groups=channels)


def disk(radius: float, edge: float) -> Tensor:
    """Weights of the pixels whose centres lie in a disk, smoothed by a Gaussian of deviation `edge`; their sum is 1."""
    taps = 1 if radius <= 8 else 2  # of the Gaussian, on each side
    half = math.floor(radius) + taps
    squares = torch.arange(-half, half + 1, dtype=torch.float32).square()
    inside = (squares[:, None] + squares <= radius**2).float()
    gaussian = (-torch.arange(-taps, taps + 1, dtype=torch.float32).square() / (2 * edge**2)).exp()
    gaussian = gaussian / gaussian.sum()
    smoothed = conv2d(inside[None, None], (gaussian[:, None] * gaussian)[None, None], padding=taps)[0, 0]
    return smoothed / smoothed.sum()


def brightness(colours_BCHW: Tensor, added: float) -> Tensor:
    """The value of HSV, the largest colour of a pixel, is raised; hue and saturation stay. Black becomes gray."""
    value_B1HW = colours_BCHW.amax(dim=1, keepdim=True)
    raised_B1HW = (value_B1HW + added).clamp(max=1)
    return torch.where(value_B1HW > 0, colours_BCHW * raised_B1HW / value_B1HW.clamp(min=1e-6), raised_B1HW)


def contrast(colours_BCHW: Tensor, share: float) -> Tensor:
    """Each colour is nearer to its mean over the image."""
    mean_BC11 = colours_BCHW.mean(dim=(2, 3), keepdim=True)
    return (colours_BCHW - mean_BC11) * share + mean_BC11


def jpeg(pixels_BCHW: Tensor, *, quality: int) -> Tensor:
    """What JPEG leaves of 8-bit pixels (B, 3, H, W), on the CPU."""
    compressed = torch.empty_like(pixels_BCHW)
    for image_CHW, out_CHW in zip(pixels_BCHW, compressed, strict=True):
        file = io.BytesIO()
        Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
        with Image.open(file) as decoded:
            out_CHW.copy_(torch.from_numpy(np.array(decoded)).permute(2, 0, 1))
    return compressed
