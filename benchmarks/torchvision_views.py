"""The views of a group as the official repositories compose them: torchvision's transforms, one image at a time.

DINO's (https://github.com/facebookresearch/dino, main_dino.py), MoCo v2's
(https://github.com/facebookresearch/moco), which PyTorch ports of SimCLR share, and MAE's
(https://github.com/facebookresearch/mae) are one composition with other numbers, but for the place of the flip.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

from ssl_pipeline.augment.views import ViewGroup

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Views = Callable[[Image.Image], list[Tensor]]
"""An image -> its views, (3, S, S) each, those of all groups in one list."""


class PillowBlur:
    """Gaussian blur by Pillow with a standard deviation drawn anew for every image."""

    def __init__(self, probability: float, sigma: tuple[float, float]) -> None:
        self.probability, self.sigma = probability, sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class PillowSolarize:
    """Inverts the values from the threshold on, with some probability."""

    def __init__(self, probability: float, threshold: float) -> None:
        self.probability, self.threshold = probability, threshold

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return ImageOps.solarize(image, threshold=round(self.threshold * 255))


class AllViews:
    """Every transform on the same image."""

    def __init__(self, transforms: Sequence[Callable[[Image.Image], Tensor]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [transform(image) for transform in self.transforms]


def official_views(groups: Mapping[str, ViewGroup]) -> AllViews:
    """torchvision's first transforms on Pillow images, as the official repositories have them."""
    return AllViews([_official_view(group, view) for group in groups.values() for view in range(group.count)])


def v2_pillow_views(groups: Mapping[str, ViewGroup]) -> AllViews:
    """The same with torchvision's transforms v2 on Pillow images."""
    return AllViews([_v2_pillow_view(group, view) for group in groups.values() for view in range(group.count)])


def v2_tensor_views(groups: Mapping[str, ViewGroup]) -> AllViews:
    """The same with torchvision's transforms v2 on 8-bit tensors, blur and solarization included."""
    return AllViews([_v2_tensor_view(group, view) for group in groups.values() for view in range(group.count)])


def open_pillow(content: bytes) -> Image.Image:
    """What ImageFolder makes of a file."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def collate(samples: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Views of each image -> each view of all images, as the default collation of torch does it."""
    return [torch.stack(views) for views in zip(*samples, strict=True)]


def _official_view(group: ViewGroup, view: int) -> v1.Compose:
    steps: list[Callable] = [
        v1.RandomResizedCrop(
            group.size, scale=group.scale, ratio=group.aspect, interpolation=v1.InterpolationMode(group.interpolation)
        ),
        v1.RandomHorizontalFlip(group.per_view(group.flip_prob)[view]),
    ]
    probability, strengths = _jitter(group, view)
    if probability:
        steps.append(v1.RandomApply([v1.ColorJitter(*strengths)], p=probability))
    if gray := group.per_view(group.gray_prob)[view]:
        steps.append(v1.RandomGrayscale(gray))
    return v1.Compose([*steps, *_pillow_filters(group, view), v1.ToTensor(), v1.Normalize(MEAN, STD)])


def _v2_pillow_view(group: ViewGroup, view: int) -> v2.Compose:
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose(
        [*_v2_geometry(group, view), *_v2_jitter(group, view), *_pillow_filters(group, view), *finish],
    )


def _v2_tensor_view(group: ViewGroup, view: int) -> v2.Compose:
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    threshold = round(group.solarize_threshold * 255)
    filters = _v2_filters(group, view, threshold=threshold)
    return v2.Compose([v2.ToImage(), *_v2_geometry(group, view), *_v2_jitter(group, view), *filters, *finish])


def v2_colours(group: ViewGroup, view: int) -> v2.Compose:
    """What follows crop and flip, on one float image (3, S, S) in [0, 1] -> a normalised one."""
    filters = _v2_filters(group, view, threshold=group.solarize_threshold)
    return v2.Compose([*_v2_jitter(group, view), *filters, v2.Normalize(MEAN, STD)])


def _v2_geometry(group: ViewGroup, view: int) -> list[Callable]:
    crop = v2.RandomResizedCrop(
        group.size,
        scale=group.scale,
        ratio=group.aspect,
        interpolation=v2.InterpolationMode(group.interpolation),
        antialias=True,
    )
    return [crop, v2.RandomHorizontalFlip(group.per_view(group.flip_prob)[view])]


def _v2_jitter(group: ViewGroup, view: int) -> list[Callable]:
    steps: list[Callable] = []
    probability, strengths = _jitter(group, view)
    if probability:
        steps.append(v2.RandomApply([v2.ColorJitter(*strengths)], p=probability))
    if gray := group.per_view(group.gray_prob)[view]:
        steps.append(v2.RandomGrayscale(gray))
    return steps


def _v2_filters(group: ViewGroup, view: int, *, threshold: float) -> list[Callable]:
    filters: list[Callable] = []
    if blur := group.per_view(group.blur_prob)[view]:
        filters.append(v2.RandomApply([v2.GaussianBlur(group.blur_kernel_size(group.size), group.blur_sigma)], p=blur))
    if solarize := group.per_view(group.solarize_prob)[view]:
        filters.append(v2.RandomSolarize(threshold, p=solarize))
    return filters


def _jitter(group: ViewGroup, view: int) -> tuple[float, tuple[float, ...]]:
    strengths = (group.brightness, group.contrast, group.saturation, group.hue)
    return group.per_view(group.jitter_prob)[view], tuple(group.per_view(value)[view] for value in strengths)


def _pillow_filters(group: ViewGroup, view: int) -> list[Callable]:
    filters: list[Callable] = []
    if blur := group.per_view(group.blur_prob)[view]:
        filters.append(PillowBlur(blur, group.blur_sigma))
    if solarize := group.per_view(group.solarize_prob)[view]:
        filters.append(PillowSolarize(solarize, group.solarize_threshold))
    return filters
