"""The views of a group by our peers: torchvision as the official repositories use it and in its second version,
lightly's transform classes and kornia's batched augmentations.

DINO's (https://github.com/facebookresearch/dino, main_dino.py), MoCo v2's
(https://github.com/facebookresearch/moco), which PyTorch ports of SimCLR share, and MAE's
(https://github.com/facebookresearch/mae) are one composition with other numbers, but for the place of the flip.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from ssl_pipeline.augment.views import ViewGroup

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Groups = Mapping[str, ViewGroup]
ViewsOf = Callable[[Image.Image], list[Tensor]]
"""An image -> its views, (3, S, S) each, those of all groups in one list."""


@dataclass(frozen=True)
class Torchvision:
    """One way to use torchvision: its module, a group's blur, and what comes before and after the transforms."""

    module: ModuleType
    blur: Callable[[ViewGroup], Callable]
    begin: tuple[Callable, ...]
    finish: tuple[Callable, ...]
    white: int = 255

    def views(self, groups: Groups) -> ViewsOf:
        t, transforms = self.module, []
        for group in groups.values():
            interpolation = t.InterpolationMode(group.interpolation)
            crop = t.RandomResizedCrop(group.size, scale=group.scale, ratio=group.aspect, interpolation=interpolation)
            for view, flip in enumerate(group.per_view(group.flip_prob)):
                steps = [*self.begin, crop, t.RandomHorizontalFlip(flip), *self.colours(group, view)]
                transforms.append(t.Compose(steps))
        return partial(_each, transforms)

    def colours(self, group: ViewGroup, view: int) -> list[Callable]:
        """What follows crop and flip, step by step."""
        t, (strengths, probabilities) = self.module, _numbers(group, view)
        jitter, gray, blur, solarize = probabilities
        steps = [
            t.RandomApply([t.ColorJitter(*strengths)], jitter),
            t.RandomGrayscale(gray),
            t.RandomApply([self.blur(group)], blur),
            t.RandomSolarize(group.solarize_threshold * self.white, solarize),
        ]
        return [*compress(steps, probabilities), *self.finish]

    def composed(self, group: ViewGroup, view: int) -> nn.Module:
        return self.module.Compose(self.colours(group, view))


def _each(transforms: Sequence[Callable[[Image.Image], Tensor]], image: Image.Image) -> list[Tensor]:
    return [transform(image) for transform in transforms]


def _pillow_blur(group: ViewGroup, image: Image.Image) -> Image.Image:
    """With a standard deviation drawn anew for every image."""
    return image.filter(ImageFilter.GaussianBlur(radius=torch.empty(1).uniform_(*group.blur_sigma).item()))


def _tensor_blur(group: ViewGroup) -> Callable[[Tensor], Tensor]:
    return v2.GaussianBlur(group.blur_kernel_size(group.size), group.blur_sigma)


AFTER_V2 = (v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD))
PILLOW_BLUR = partial(partial, _pillow_blur)
TORCHVISION = {
    "official": Torchvision(v1, PILLOW_BLUR, (), (v1.ToTensor(), v1.Normalize(MEAN, STD))),
    "torchvision v2, Pillow": Torchvision(v2, PILLOW_BLUR, (), (v2.ToImage(), *AFTER_V2)),
    "torchvision v2, tensors": Torchvision(v2, _tensor_blur, (v2.ToImage(),), AFTER_V2),
}
"""The transforms of the official repositories on Pillow images; v2's on those, and on 8-bit tensors, blur included."""
FLOAT = Torchvision(v2, _tensor_blur, (), (v2.Normalize(MEAN, STD),), white=1)  # on one image (3, S, S) in [0, 1]


def _numbers(group: ViewGroup, view: int) -> tuple[list[float], list[float]]:
    """What a view has: strengths of the jitter; probabilities of jitter, grey, blur and solarization."""
    names = ("brightness", "contrast", "saturation", "hue", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob")
    numbers = [group.per_view(getattr(group, name))[view] for name in names]
    return numbers[:4], numbers[4:]


def open_pillow(content: bytes) -> Image.Image:
    """What ImageFolder makes of a file."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def one_by_one(views: ViewsOf, files: Sequence[bytes]) -> list[Tensor]:
    """Encoded images -> each view of all of them, as torch's default collation makes it."""
    with torch.no_grad():
        samples = [views(open_pillow(content)) for content in files]
        return [torch.stack(view) for view in zip(*samples, strict=True)]


def lightly_views(groups: Groups) -> ViewsOf:
    """lightly's transform for these groups, with the groups' own numbers."""
    from lightly import transforms

    first, *others = groups.values()
    blur, solarize = first.per_view(first.blur_prob), first.per_view(first.solarize_prob)
    if others:
        (local,) = others
        return transforms.DINOTransform(
            global_crop_size=first.size,
            global_crop_scale=first.scale,
            local_crop_size=local.size,
            local_crop_scale=local.scale,
            n_local_views=local.count,
            gaussian_blur=(*blur, local.per_view(local.blur_prob)[0]),
            solarization_prob=solarize[1],
            **_lightly_jitter(first, strength=0.5),
        )
    common = {"input_size": first.size, "min_scale": first.scale[0]}
    if first.count == 1:
        return transforms.MAETransform(**common)
    jitter = _lightly_jitter(first, strength=1.0)
    return transforms.SimCLRTransform(gaussian_blur=blur[0], sigmas=first.blur_sigma, **common, **jitter)


def _lightly_jitter(group: ViewGroup, *, strength: float) -> dict[str, float]:
    names = {"bright": "brightness", "contrast": "contrast", "sat": "saturation", "hue": "hue"}
    numbers = {f"cj_{short}": group.per_view(getattr(group, name))[0] / strength for short, name in names.items()}
    return {**numbers, "cj_prob": group.per_view(group.jitter_prob)[0], "cj_strength": strength}


def kornia_views(groups: Groups) -> Callable[[Sequence[bytes]], list[Tensor]]:
    """Encoded images -> each view of all of them: crops one by one, since images differ in size, then batched.

    kornia resizes without antialiasing and its fixed blur kernel is drawn per image.
    """
    from kornia import augmentation

    views = []
    for group in groups.values():
        for view, flip in enumerate(group.per_view(group.flip_prob)):
            crop = augmentation.RandomResizedCrop(
                (group.size, group.size), scale=group.scale, ratio=group.aspect, resample=group.interpolation
            )
            colours = nn.Sequential(augmentation.RandomHorizontalFlip(p=flip), kornia_colours(group, view))
            views.append((crop, colours))

    def views_of(files: Sequence[bytes]) -> list[Tensor]:
        images = [torch.from_numpy(np.array(open_pillow(content))).permute(2, 0, 1)[None] for content in files]
        with torch.no_grad():
            floats = [image.float().div_(255) for image in images]
            return [colours(torch.cat([crop(image) for image in floats])) for crop, colours in views]

    return views_of


def kornia_colours(group: ViewGroup, view: int) -> nn.Module:
    """What follows crop and flip: float images (N, 3, S, S) in [0, 1] -> normalised ones."""
    from kornia import augmentation

    strengths, probabilities = _numbers(group, view)
    jitter, gray, blur, solarize = probabilities
    steps = [
        augmentation.ColorJitter(*strengths, p=jitter),
        augmentation.RandomGrayscale(p=gray),
        augmentation.RandomGaussianBlur((group.blur_kernel_size(group.size),) * 2, group.blur_sigma, p=blur),
        augmentation.RandomSolarize(0.0, 0.0, p=solarize),
    ]
    return nn.Sequential(*compress(steps, probabilities), augmentation.Normalize(MEAN, STD))
