"""The views of a group by lightly's transform classes and by kornia's batched augmentations, where installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.torchvision_views import MEAN, STD, open_pillow
from ssl_pipeline.augment.views import ViewGroup


def lightly_views(groups: Mapping[str, ViewGroup]) -> Callable[[Image.Image], list[Tensor]]:
    """lightly's transform for these groups, with the groups' own numbers."""
    from lightly import transforms

    if "global" in groups:
        large, small = groups["global"], groups["local"]
        first, second = large.per_view(large.blur_prob)
        return transforms.DINOTransform(
            global_crop_size=large.size,
            global_crop_scale=large.scale,
            local_crop_size=small.size,
            local_crop_scale=small.scale,
            n_local_views=small.count,
            gaussian_blur=(first, second, small.per_view(small.blur_prob)[0]),
            solarization_prob=large.per_view(large.solarize_prob)[1],
            **_jitter(large, strength=0.5),
        )
    if "view" in groups:
        view = groups["view"]
        return transforms.SimCLRTransform(
            input_size=view.size,
            min_scale=view.scale[0],
            gaussian_blur=view.per_view(view.blur_prob)[0],
            sigmas=view.blur_sigma,
            **_jitter(view, strength=1.0),
        )
    image = groups["image"]
    return transforms.MAETransform(input_size=image.size, min_scale=image.scale[0])


def _jitter(group: ViewGroup, *, strength: float) -> dict[str, float]:
    names = {"bright": "brightness", "contrast": "contrast", "sat": "saturation", "hue": "hue"}
    numbers = {f"cj_{short}": group.per_view(getattr(group, name))[0] / strength for short, name in names.items()}
    return {**numbers, "cj_prob": group.per_view(group.jitter_prob)[0], "cj_strength": strength}


class KorniaViews:
    """Encoded images -> each view of all of them: crops one by one, since images differ in size, then batched.

    kornia resizes without antialiasing and its fixed blur kernel is drawn per image.
    """

    def __init__(self, groups: Mapping[str, ViewGroup]) -> None:
        views = [(group, view) for group in groups.values() for view in range(group.count)]
        self.crops = [_kornia_crop(group) for group, _ in views]
        self.colours = [nn.Sequential(_kornia_flip(group, view), kornia_colours(group, view)) for group, view in views]

    def __call__(self, files: Sequence[bytes]) -> list[Tensor]:
        images = [_as_float(open_pillow(content)) for content in files]
        with torch.no_grad():
            return [
                colour(torch.cat([crop(image) for image in images]))
                for crop, colour in zip(self.crops, self.colours, strict=True)
            ]


def _as_float(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div_(255)


def _kornia_crop(group: ViewGroup) -> nn.Module:
    from kornia import augmentation

    return augmentation.RandomResizedCrop(
        (group.size, group.size), scale=group.scale, ratio=group.aspect, resample=group.interpolation
    )


def _kornia_flip(group: ViewGroup, view: int) -> nn.Module:
    from kornia import augmentation

    return augmentation.RandomHorizontalFlip(p=group.per_view(group.flip_prob)[view])


def kornia_colours(group: ViewGroup, view: int) -> nn.Module:
    """What follows crop and flip: float images (N, 3, S, S) in [0, 1] -> normalised ones."""
    from kornia import augmentation

    def value(name: str) -> float:
        return group.per_view(getattr(group, name))[view]

    steps: list[nn.Module] = []
    if value("jitter_prob"):
        strengths = [value(name) for name in ("brightness", "contrast", "saturation", "hue")]
        steps.append(augmentation.ColorJitter(*strengths, p=value("jitter_prob")))
    if value("gray_prob"):
        steps.append(augmentation.RandomGrayscale(p=value("gray_prob")))
    if value("blur_prob"):
        kernel = (group.blur_kernel_size(group.size),) * 2
        steps.append(augmentation.RandomGaussianBlur(kernel, group.blur_sigma, p=value("blur_prob")))
    if value("solarize_prob"):
        steps.append(augmentation.RandomSolarize(0.0, 0.0, p=value("solarize_prob")))
    return nn.Sequential(*steps, augmentation.Normalize(MEAN, STD))
