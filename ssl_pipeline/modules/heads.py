"""Networks on top of a backbone during pretraining only: projectors, predictors, prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LastBatchNorm = Literal["none", "no_affine", "no_shift", "affine"]


class MLPHead(nn.Sequential):
    """Linear layers with ReLU between them: the projectors and predictors of SimCLR, MoCo, BYOL and SimSiam.

    dims: width of the input, of each hidden layer, of the output.
    batch_norm: batch norm after each hidden linear layer.
    last_batch_norm: after the output nothing ("none"), only normalisation ("no_affine": MoCo v3, SimSiam), with a
        scale ("no_shift": SimCLR), or with scale and shift ("affine").
    bias, last_bias: whether the hidden linear layers, the last linear layer have a bias.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        batch_norm: bool = True,
        last_batch_norm: LastBatchNorm = "none",
        bias: bool = False,
        last_bias: bool = False,
    ) -> None:
        if len(dims) < 2:
            raise ValueError(f"MLPHead needs the widths of input and output at least. Got {tuple(dims)}.")
        layers: list[nn.Module] = []
        in_dim, *hidden_dims, out_dim = dims
        for hidden_dim in hidden_dims:
            layers.append(nn.Linear(in_dim, hidden_dim, bias=bias))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.ReLU(inplace=True))
            in_dim = hidden_dim
        layers.append(nn.Linear(in_dim, out_dim, bias=last_bias))
        if last_batch_norm != "none":
            norm = nn.BatchNorm1d(out_dim, affine=last_batch_norm != "no_affine")
            if last_batch_norm == "no_shift":
                norm.bias.requires_grad_(False)
            layers.append(norm)
        super().__init__(*layers)


def projector_dims(in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int) -> tuple[int, ...]:
    """The `dims` of an MLPHead of so many linear layers whose hidden layers have one width."""
    return in_dim, *[hidden_dim] * (num_layers - 1), out_dim


class PrototypeHead(nn.Module):
    """DINO's head: an MLP to a unit-length bottleneck, then its cosine with each prototype.

    (B, in_dim) -> (B, num_prototypes) logits. The prototypes are the parameters under the prefix `last_layer.`. With
    `fixed_scale` their rows have length 1 whatever the values of `weight_v`; without it the lengths are trained too.
    Without `weight_norm` they are a plain linear layer (DINOv3), whose `weight` begins small, and there is no scale.
    Parameter names are the official ones (mlp.0.weight, ..., last_layer.weight_g, last_layer.weight_v).
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        fixed_scale: bool = True,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"PrototypeHead needs num_layers of at least 1. Got {num_layers}.")
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers.append(_official_linear(in_dim, hidden_dim))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            in_dim = hidden_dim
        layers.append(_official_linear(in_dim, bottleneck_dim))
        self.mlp = nn.Sequential(*layers)
        self.last_layer: WeightNormLinear | nn.Linear
        if weight_norm:
            self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes, fixed_scale=fixed_scale)
        else:
            self.last_layer = _official_linear(bottleneck_dim, num_prototypes, bias=False)

    def prototypes(self) -> Tensor:
        """(num_prototypes, bottleneck_dim)."""
        return self.last_layer.weight

    def bottleneck(self, features: Tensor) -> Tensor:
        """(..., in_dim) -> (..., bottleneck_dim) of unit length: what is compared with the prototypes."""
        rows = self.mlp(features.flatten(0, -2))  # as batch norm takes them
        return F.normalize(rows, dim=-1).unflatten(0, features.shape[:-1])

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(features))


class Prototypes(nn.Module):
    """SwAV's prototypes (Caron et al., 2020, https://arxiv.org/abs/2006.09882): (..., in_dim) -> (..., num_prototypes).

    weight: (num_prototypes, in_dim), rows of length 1 at first; training changes that until `normalize_` is called.
    """

    def __init__(self, in_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, in_dim))
        nn.init.uniform_(self.weight, -(in_dim**-0.5), in_dim**-0.5)
        self.normalize_()

    @torch.no_grad()
    def normalize_(self) -> None:
        """Set every row to length 1, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.linear(embeddings, self.weight)


class WeightNormLinear(nn.Module):
    """A linear layer without bias; row k of its weight is weight_g[k] * weight_v[k] / |weight_v[k]|."""

    def __init__(self, in_dim: int, out_dim: int, *, fixed_scale: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not fixed_scale)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.uniform_(self.weight_v, -(in_dim**-0.5), in_dim**-0.5)

    @property
    def weight(self) -> Tensor:
        # what torch.nn.utils.parametrizations.weight_norm calls; a norm and a division would take twice the time
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)


def _official_linear(in_dim: int, out_dim: int, *, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(in_dim, out_dim, bias=bias)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class PixelShuffleDecoder(nn.Sequential):
    """SimMIM's decoder (Xie et al., 2021, https://arxiv.org/abs/2111.09886): each token paints a square of pixels.

    (N, in_dim, h, w) -> (N, channels, h * stride, w * stride): one 1x1 convolution with bias to channels * stride^2
    values, which `torch.nn.PixelShuffle` lays out.
    """

    def __init__(self, in_dim: int, stride: int, *, channels: int = 3) -> None:
        if in_dim < 1 or stride < 1 or channels < 1:
            raise ValueError(
                f"PixelShuffleDecoder needs in_dim, stride and channels of at least 1. Got {in_dim}, {stride} and "
                f"{channels}."
            )
        super().__init__(nn.Conv2d(in_dim, channels * stride**2, kernel_size=1), nn.PixelShuffle(stride))
