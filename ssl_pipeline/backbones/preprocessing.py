"""What a backbone expects of images, and the transform to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ssl_pipeline.augment.central_crop import Fit, Interpolation, central_crop
from ssl_pipeline.augment.rgb import as_rgb


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects of an image: its side in pixels and the mean and deviation of each channel.

    interpolation, fit: how an evaluation resizes images, and whether it cuts out their central square or stretches them
    to one; the evaluation chooses it, a finished run does not keep it.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    fit: Fit = "crop"


@dataclass(frozen=True)
class ImageTransform:
    """An image -> (3, size, size) float32, as the evaluators see it; for data sets of torch, in any process.

    Resized and cut to its central square by `central_crop`, divided by 255, less the mean, over the deviation.
    """

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image | NDArray[np.uint8] | Tensor) -> Tensor:
        """image: a Pillow image, turned upright by its EXIF data; or 8-bit RGB (H, W, 3), an array or a tensor.

        Raises ValueError for anything else.
        """
        if isinstance(image, Image.Image):
            image = np.array(as_rgb(ImageOps.exif_transpose(image)))
        pixels_HWC = torch.as_tensor(image)
        if pixels_HWC.dtype != torch.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
            raise ValueError(
                "a backbone's transform needs an image of Pillow, or 8-bit RGB (height, width, 3). "
                f"Got {pixels_HWC.dtype} {tuple(pixels_HWC.shape)}."
            )
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (self.preprocessing.mean, self.preprocessing.std))
        square = central_crop(pixels_HWC, self.preprocessing.size, self.preprocessing.interpolation)
        return square.float().div_(255).sub_(mean).div_(std)
