"""The convolutional encoder of DALL-E's discrete VAE (Ramesh et al., 2021, https://arxiv.org/abs/2102.12092) for timm.

Its parameters are named as in the released encoder, with `weight` and `bias` in place of `w` and `b`.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import relu


class DalleEncoder(nn.Module):
    """(B, 3, H, W) -> a map (B, 8 * hidden_dim, H / 8, W / 8): four groups of residual blocks, halved after three.

    num_groups: another number of them; a cell of the map covers 2^(num_groups - 1) pixels.
    """

    def __init__(
        self, *, hidden_dim: int, blocks_per_group: int, num_groups: int, num_classes: int, in_chans: int
    ) -> None:
        super().__init__()
        num_blocks, in_dim = num_groups * blocks_per_group, hidden_dim
        parts: OrderedDict[str, nn.Module] = OrderedDict(input=nn.Conv2d(in_chans, hidden_dim, 7, padding=3))
        for group in range(num_groups):
            dim = hidden_dim * 2**group
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for number in range(blocks_per_group):
                blocks[f"block_{number + 1}"] = ResidualBlock(in_dim, dim, kernels=(3, 3, 3, 1), num_blocks=num_blocks)
                in_dim = dim
            if group < num_groups - 1:
                blocks["pool"] = nn.MaxPool2d(2)
            parts[f"group_{group + 1}"] = nn.Sequential(blocks)
        self.blocks = nn.Sequential(parts)
        initialise_convolutions(self)
        self.num_features = self.head_hidden_size = in_dim
        self.classifier = nn.Linear(in_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the map."""
        return relu(self.blocks(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean over the map, and its classifier."""
        pooled = features.mean(dim=(2, 3))
        return pooled if pre_logits else self.classifier(pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.classifier


class ResidualBlock(nn.Module):
    """(B, in_dim, H, W) -> (B, out_dim, H, W): four convolutions after a ReLU each, through a quarter of the width.

    kernels: their sides. What they add is divided by the square of the number of blocks in the network.
    """

    def __init__(self, in_dim: int, out_dim: int, *, kernels: tuple[int, int, int, int], num_blocks: int) -> None:
        super().__init__()
        inner = max(out_dim // 4, 1)
        dims = (in_dim, inner, inner, inner, out_dim)
        self.gain = num_blocks**-2
        self.id_path: nn.Module = nn.Conv2d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, side in enumerate(kernels):
            layers[f"relu_{number + 1}"] = nn.ReLU()
            layers[f"conv_{number + 1}"] = nn.Conv2d(dims[number], dims[number + 1], side, padding=side // 2)
        self.res_path = nn.Sequential(layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.id_path(inputs) + self.gain * self.res_path(inputs)


@torch.no_grad()
def initialise_convolutions(module: nn.Module) -> None:
    """Weights N(0, 1 / fan-in) and zero biases for every convolution inside, as the official code."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=(part.in_channels * part.kernel_size[0] ** 2) ** -0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@register_model
def dalle_encoder(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: str | Path | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    hidden_dim: int = 256,
    blocks_per_group: int = 2,
    num_groups: int = 4,
) -> DalleEncoder:
    """DALL-E's encoder, 53 M parameters without its codes; timm hands over the first four arguments."""
    if pretrained:
        raise ValueError("dalle_encoder has no pretrained weights.")
    return DalleEncoder(
        hidden_dim=hidden_dim,
        blocks_per_group=blocks_per_group,
        num_groups=num_groups,
        num_classes=num_classes,
        in_chans=in_chans,
    )
