"""Wide ResNet (Zagoruyko & Komodakis, 2016, https://arxiv.org/abs/1605.07146) as in FixMatch's official code, under
the name `wide_resnet28_2` in timm's registry."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

NEGATIVE_SLOPE = 0.1
EPS = 1e-3  # TensorFlow's


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and leaky ReLU, added to their input.

    Where the width changes, a 1x1 convolution brings the input to it. `activated` gives the shortcut the input after
    batch norm and leaky ReLU (the first block of the network) instead of before them.
    """

    def __init__(self, in_dim: int, dim: int, *, stride: int, activated: bool, momentum: float) -> None:
        super().__init__()
        self.activated = activated
        self.norm1 = nn.BatchNorm2d(in_dim, eps=EPS, momentum=momentum)
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1)
        self.norm2 = nn.BatchNorm2d(dim, eps=EPS, momentum=momentum)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.shortcut = nn.Conv2d(in_dim, dim, 1, stride=stride) if in_dim != dim else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        active = leaky_relu(self.norm1(inputs), NEGATIVE_SLOPE)
        hidden = leaky_relu(self.norm2(self.conv1(active)), NEGATIVE_SLOPE)
        return self.shortcut(active if self.activated else inputs) + self.conv2(hidden)


class WideResNet(nn.Module):
    """Images (B, C, H, W) -> features (B, 4 * first_dim), or class scores if there are classes.

    A 3x3 convolution to 16 channels, three stages of `blocks` blocks with `first_dim` channels, twice and four times
    as many, of which the second and the third halve the resolution, then batch norm, leaky ReLU and the mean over all
    places. Convolutions begin normal with deviation sqrt(2 / (kernel area * output channels)), the classifier
    Xavier-normal, all biases at zero.
    """

    def __init__(
        self, *, blocks: int, first_dim: int, num_classes: int, in_chans: int, batch_norm_momentum: float
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 4 * first_dim
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1)
        self.blocks = nn.Sequential()
        in_dim = 16
        for stage in range(3):
            for number in range(blocks):
                dim = first_dim << stage
                stride = 2 if stage and not number else 1
                activated = stage == number == 0
                self.blocks.append(
                    WideBlock(in_dim, dim, stride=stride, activated=activated, momentum=batch_norm_momentum)
                )
                in_dim = dim
        self.norm = nn.BatchNorm2d(in_dim, eps=EPS, momentum=batch_norm_momentum)
        self.classifier = nn.Linear(in_dim, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_features)."""
        return leaky_relu(self.norm(self.blocks(self.stem(images))), NEGATIVE_SLOPE).mean(dim=(2, 3))

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Its layers, in the form of timm's networks."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.no_grad()
    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                area = layer.kernel_size[0] * layer.kernel_size[1]
                nn.init.normal_(layer.weight, std=math.sqrt(2 / (area * layer.out_channels)))
            elif isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)


@register_model
def wide_resnet28_2(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 10,
    in_chans: int = 3,
    batch_norm_momentum: float = 0.001,
) -> WideResNet:
    """WRN-28-2 for images of 32 pixels, 1.47 M parameters without classifier; timm hands over the first four arguments.

    batch_norm_momentum: the share that a batch has in the running statistics; FixMatch's 0.001 suits runs of many
    thousand steps (the statistics of the first are still 37 % of it after 1,000).
    """
    if pretrained:
        raise ValueError("wide_resnet28_2 has no pretrained weights.")
    return WideResNet(
        blocks=4,
        first_dim=32,
        num_classes=num_classes,
        in_chans=in_chans,
        batch_norm_momentum=batch_norm_momentum,
    )
