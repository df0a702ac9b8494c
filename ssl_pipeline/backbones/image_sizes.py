"""Which images a backbone takes, found before the run by a forward pass that computes no numbers.

It runs on a copy without memory (torch's meta device), so that it costs milliseconds for a network of any size and
changes neither weights nor statistics nor random state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones.config import BackboneConfig
from ssl_pipeline.backbones.create import create_backbone
from ssl_pipeline.backbones.memory_format import meta_copy
from ssl_pipeline.backbones.networks import Backbone, TokenBackbone
from ssl_pipeline.backbones.weights import first_line
from ssl_pipeline.config import ConfigError

NUM_IMAGES, NUM_CHANNELS = 2, 3
STEPS = (2, 4, 7, 8, 14, 16, 28, 32)  # in pixels: what the sizes that networks take are multiples of
USUAL = (32, 64, 96, 128, 160, 192, 224, 256)
LONGEST_REASON = 160  # characters of a network's error


def check_image_sizes(
    backbone: Backbone, sizes: Mapping[str, Sequence[int]], *, arguments: str | None = "backbone.arguments"
) -> None:
    """Raises ConfigError if the backbone makes no features (B, embed_dim) of images (B, 3, S, S) of one of the sizes.

    sizes: the sides S in pixels by the key that sets them; arguments: the key of the timm model's arguments, None where
    they cannot be chosen. The sentence names the key and the size, and what works instead.
    """
    meta = meta_copy(backbone)
    is_meta = all(parameter.is_meta for parameter in backbone.parameters())
    for key, sides in sizes.items():
        for size in sides:
            reason = _fails(meta, size)
            if reason is not None and not is_meta:  # the meta device may lack something that others have
                reason = _fails(copy.deepcopy(backbone).cpu(), size)
            if reason is not None:
                given = ", ".join(map(str, sides))
                raise ConfigError(
                    f"{key}={given} does not suit the backbone '{backbone.config.name}': it does not take images of "
                    f"{NUM_CHANNELS} channels and {size}x{size} pixels ({reason}). "
                    f"{_advice(meta, sizes, key, size, arguments)}"
                )


@torch.no_grad()
def starved_convolution(backbone: Backbone, size: int) -> str | None:
    """The name of the first convolution with a stride that is given one pixel of an image (S, S); None if none is."""
    meta, found = meta_copy(backbone), list[str]()

    def look(name: str, part: nn.Conv2d, images: tuple[Tensor, ...]) -> None:
        if max(images[0].shape[-2:]) == 1 < min(*part.stride, *part.kernel_size):
            found.append(name)

    for name, part in meta.model.named_modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_pre_hook(lambda part, images, name=name: look(name, part, images))
    return found[0] if _fails(meta, size) is None and found else None


def smallest_size(backbone: Backbone, size: int) -> int:
    """The next larger side of an image for which no convolution is starved."""
    return next(other for other in range(size + 1, 2**14) if starved_convolution(backbone, other) is None)


@torch.no_grad()
def _fails(backbone: Backbone, size: int) -> str | None:
    """What goes wrong with two images; the backbone is a copy."""
    like = next(backbone.parameters())
    try:
        if isinstance(backbone, TokenBackbone):
            backbone.check_size(size, size)
        with torch.random.fork_rng(devices=[]):
            features = backbone.eval()(like.new_zeros(NUM_IMAGES, NUM_CHANNELS, size, size))
    except Exception as error:  # whatever timm and torch raise
        return first_line(error)[:LONGEST_REASON].rstrip(".")
    wanted = (NUM_IMAGES, backbone.embed_dim)
    if isinstance(features, Tensor) and features.shape == wanted:
        return None
    got = f"of shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
    return f"its output for {NUM_IMAGES} of them is {got}, not {wanted}"


def _advice(meta: Backbone, sizes: Mapping[str, Sequence[int]], key: str, size: int, arguments: str | None) -> str:
    """What works instead, tried out; the nearest size first, then other arguments of the network."""
    other = next((other for other in _nearby(meta, size) if _fails(meta, other) is None), None)
    tries = [] if other is None else [f"{key}={other}"]
    if arguments is not None:
        config = meta.config
        if all(side == size for sides in sizes.values() for side in sides) and _takes(config, size, img_size=size):
            tries.append(f"{arguments}.img_size={size}")
        tries += [f"{arguments}.{name}=null" for name in config.arguments if _takes(config, size, **{name: None})]
        if not tries and _takes(config, size, **dict.fromkeys(config.arguments)):
            tries.append(f"{arguments}={{}}")
    return f"Try {', or '.join(tries)}." if tries else "Choose another backbone."


def _nearby(backbone: Backbone, size: int) -> Iterator[int]:
    """Sizes that networks like this one take, nearest first."""
    own, patch = getattr(backbone.model, "default_cfg", {}).get("input_size", (NUM_CHANNELS, 224, 224))[-1], 1
    if isinstance(backbone, TokenBackbone):
        own, patch = backbone.grid[0] * backbone.patch_size, backbone.patch_size
    rounded = {times * step for step in (*STEPS, patch) for times in (size // step, -(-size // step))}
    yield from sorted({own, *USUAL, *rounded} - {0, size}, key=lambda other: (abs(other - size), -other))


def _takes(config: BackboneConfig, size: int, **changes: int | None) -> bool:
    """Whether the network with these arguments instead (None: without them) takes images of this size."""
    arguments = {name: value for name, value in (config.arguments | changes).items() if value is not None}
    plain = config.model_copy(update={"arguments": arguments, "weights": None})
    try:
        with torch.device("meta"):
            return _fails(create_backbone(plain), size) is None
    except Exception:  # timm has no such network
        return False
