"""The stem of a ResNet for images of about 32 pixels: a 3x3 convolution of stride 1 and no max-pool."""

from __future__ import annotations

from timm.models import ResNet
from torch import nn

SIDE = 3  # of its kernel


def takes_small_stem(model: nn.Module) -> bool:
    """Whether a network is a ResNet with a single stem convolution."""
    return isinstance(model, ResNet) and isinstance(model.conv1, nn.Conv2d)


def shrink_stem(model: nn.Module) -> None:
    """Give a network that `takes_small_stem` the small one, at random initialisation."""
    old = model.conv1
    assert isinstance(old, nn.Conv2d)
    stem = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=SIDE, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm does
    model.add_module("conv1", stem)
    model.add_module("maxpool", nn.Identity())
