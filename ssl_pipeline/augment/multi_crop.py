"""The views of a run for your own training loop: decoded images in, multi-crop views out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_pipeline.augment.crops import crop_images
from ssl_pipeline.augment.draw import ViewSampler
from ssl_pipeline.augment.operations.base import IMAGENET_MEAN, IMAGENET_STD, Channels
from ssl_pipeline.augment.photometric import apply_photometric
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import ConfigError


class MultiCrop:
    """Groups of views of some images: cropped, flipped, their colours changed, normalised; those that a run makes.

    groups: the settings of the views of each name, as in a recipe's `augment` section. There is no random state: views
    follow from the seed, the epoch and the image's id, in any process. Raises ConfigError for a group of several sizes,
    which a run draws again in each step.
    """

    def __init__(
        self,
        groups: Mapping[str, ViewGroup],
        *,
        mean: Channels = IMAGENET_MEAN,
        std: Channels = IMAGENET_STD,
        seed: int = 0,
    ) -> None:
        for name, group in groups.items():
            if len(group.sizes) > 1:
                raise ConfigError(f"MultiCrop makes views of one size. Got {name} with {group.sizes}; use two groups.")
        self.sampler = ViewSampler(groups, {}, seed, global_batch=1)
        self.mean, self.std = mean, std

    def __call__(
        self, images: Sequence[Tensor] | Tensor, ids: Sequence[int] | Tensor, *, epoch: int, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """(V, B, 3, S, S) float32 on `device` for each group, V views of each of B images.

        images: (3, H, W) uint8 each, on the CPU, of any size; or one tensor (B, 3, H, W). ids: the number of each in
        its data set. Crops are made on the CPU in 8 bits, colours on the device. Raises ValueError for other images.
        """
        images_HWC = [_checked(image).permute(1, 2, 0) for image in images]
        if not images_HWC or len(images_HWC) != len(ids):
            raise ValueError(f"MultiCrop needs one id for each image. Got {len(images_HWC)} images and {len(ids)} ids.")
        drawn = self.sampler.draw(
            range(len(ids)),
            epochs_B=np.full(len(ids), epoch, dtype=np.int64),
            samples_B=np.asarray(ids, dtype=np.int64),
            heights_B=np.array([image.shape[0] for image in images_HWC]),
            widths_B=np.array([image.shape[1] for image in images_HWC]),
        )
        views = {}
        for name, of in drawn.items():
            group, (size,) = self.sampler.groups[name], self.sampler.groups[name].sizes
            crops_VBHWC = torch.empty((*of.flips.shape, size, size, 3), dtype=torch.uint8)
            crop_images(images_HWC, of.boxes, of.flips, interpolation=group.interpolation, out=crops_VBHWC)
            views[name] = apply_photometric(
                crops_VBHWC.movedim(-1, 2).to(device),
                torch.from_numpy(of.draws).to(device),
                group,
                mean=group.mean or self.mean,
                std=group.std or self.std,
            )
        return views


def _checked(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or image.device.type != "cpu":
        raise ValueError(
            "MultiCrop needs images of 8 bits (3, H, W) on the CPU, as torchvision's pil_to_tensor makes them of RGB "
            f"images. Got {image.dtype} {tuple(image.shape)} on {image.device}."
        )
    return image
