"""The views of a group by our peers: torchvision as the official repositories use it and in its second version,
lightly's transform classes and kornia's batched augmentations.

DINO's (https://github.com/facebookresearch/dino, main_dino.py), MoCo v2's
(https://github.com/facebookresearch/moco), which PyTorch ports of SimCLR share, and MAE's
(https://github.com/facebookresearch/mae) are one composition with other numbers, but for the place of the flip.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from ssl_pipeline.augment.views import ViewGroup

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

FINISH = (v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD))

ViewsOf = Callable[[Image.Image], list[Tensor]]
"""An image -> its views, (3, S, S) each, those of all groups in one list."""


def official_views(groups: Mapping[str, ViewGroup]) -> ViewsOf:
    """torchvision's first transforms on Pillow images, as the official repositories have them."""
    return _torchvision_views(
        groups, v1, partial(partial, _pillow_blur), finish=(v1.ToTensor(), v1.Normalize(MEAN, STD))
    )


def v2_pillow_views(groups: Mapping[str, ViewGroup]) -> ViewsOf:
    """The same with torchvision's transforms v2 on Pillow images."""
    return _torchvision_views(groups, v2, partial(partial, _pillow_blur), finish=(v2.ToImage(), *FINISH))


def v2_tensor_views(groups: Mapping[str, ViewGroup]) -> ViewsOf:
    """The same with torchvision's transforms v2 on 8-bit tensors, blur and solarization included."""
    return _torchvision_views(groups, v2, _tensor_blur, begin=(v2.ToImage(),), finish=FINISH)


def v2_colours(group: ViewGroup, view: int) -> nn.Module:
    """What follows crop and flip, on one float image (3, S, S) in [0, 1] -> a normalised one."""
    return v2.Compose([*_torchvision_colours(v2, group, view, _tensor_blur, white=1), v2.Normalize(MEAN, STD)])


def _torchvision_views(
    groups: Mapping[str, ViewGroup],
    t: ModuleType,
    blur_of: Callable[[ViewGroup], Callable],
    *,
    begin: Sequence[Callable] = (),
    finish: Sequence[Callable],
) -> ViewsOf:
    transforms = []
    for group in groups.values():
        interpolation = t.InterpolationMode(group.interpolation)
        crop = t.RandomResizedCrop(group.size, scale=group.scale, ratio=group.aspect, interpolation=interpolation)
        for view, flip in enumerate(group.per_view(group.flip_prob)):
            colours = _torchvision_colours(t, group, view, blur_of, white=255)
            transforms.append(t.Compose([*begin, crop, t.RandomHorizontalFlip(flip), *colours, *finish]))
    return partial(_each, transforms)


def _each(transforms: Sequence[Callable[[Image.Image], Tensor]], image: Image.Image) -> list[Tensor]:
    return [transform(image) for transform in transforms]


def _torchvision_colours(
    t: ModuleType, group: ViewGroup, view: int, blur_of: Callable[[ViewGroup], Callable], *, white: int
) -> list[Callable]:
    return _colours(
        group,
        view,
        jitter=lambda *strengths, p: t.RandomApply([t.ColorJitter(*strengths)], p=p),
        gray=t.RandomGrayscale,
        blur=partial(t.RandomApply, [blur_of(group)]),
        solarize=partial(t.RandomSolarize, group.solarize_threshold * white),
    )


def _pillow_blur(group: ViewGroup, image: Image.Image) -> Image.Image:
    """With a standard deviation drawn anew for every image."""
    return image.filter(ImageFilter.GaussianBlur(radius=torch.empty(1).uniform_(*group.blur_sigma).item()))


def _tensor_blur(group: ViewGroup) -> Callable[[Tensor], Tensor]:
    return v2.GaussianBlur(group.blur_kernel_size(group.size), group.blur_sigma)


def _colours(
    group: ViewGroup, view: int, *, jitter: Callable, gray: Callable, blur: Callable, solarize: Callable
) -> list:
    """The steps that a view has, each made for its probability `p`."""

    def of_view(name: str) -> float:
        return group.per_view(getattr(group, name))[view]

    strengths = map(of_view, ("brightness", "contrast", "saturation", "hue"))
    probabilities = [of_view(f"{name}_prob") for name in ("jitter", "gray", "blur", "solarize")]
    makers: list[Callable] = [partial(jitter, *strengths), gray, blur, solarize]
    return [make(p=probability) for make, probability in zip(makers, probabilities, strict=True) if probability]


def open_pillow(content: bytes) -> Image.Image:
    """What ImageFolder makes of a file."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def one_by_one(views: ViewsOf, files: Sequence[bytes]) -> list[Tensor]:
    """Encoded images -> each view of all of them, as torch's default collation makes it."""
    with torch.no_grad():
        samples = [views(open_pillow(content)) for content in files]
        return [torch.stack(view) for view in zip(*samples, strict=True)]


def lightly_views(groups: Mapping[str, ViewGroup]) -> ViewsOf:
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


def kornia_views(groups: Mapping[str, ViewGroup]) -> Callable[[Sequence[bytes]], list[Tensor]]:
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

    steps = _colours(
        group,
        view,
        jitter=augmentation.ColorJitter,
        gray=augmentation.RandomGrayscale,
        blur=partial(augmentation.RandomGaussianBlur, (group.blur_kernel_size(group.size),) * 2, group.blur_sigma),
        solarize=partial(augmentation.RandomSolarize, 0.0, 0.0),
    )
    return nn.Sequential(*steps, augmentation.Normalize(MEAN, STD))
