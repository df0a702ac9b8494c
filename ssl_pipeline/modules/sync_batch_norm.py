"""Batch norm over the images of all processes, on GPUs (torch's own) and on CPUs, where torch has none."""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ssl_pipeline.config import ConfigError
from ssl_pipeline.distributed import world_size


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch norm replaced by one whose statistics are those of the global batch."""
    if world_size() == 1:
        return module
    if device.type == "cuda":
        return convert_sync_batchnorm(module)
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
                child.__class__ = CpuSyncBatchNorm  # same parameters and buffers, another forward
            elif isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, CpuSyncBatchNorm):
                raise ConfigError(
                    f"train.sync_batch_norm on CPUs supports only plain batch norm. {name} is a "
                    f"{type(child).__name__}: use one process, or a GPU."
                )
    return module


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """(B, C, ...) batch norm with mean and variance over the rows of all processes, gradients included."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes behind the channels."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        inputs = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        count = inputs.numel() // inputs.shape[1] * world_size()
        mean = _SumOverRanks.apply(inputs.sum(axes)) / count
        centred = inputs - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / count
        self._follow(mean, variance * count / max(count - 1, 1))
        outputs = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            outputs = outputs * self.weight.view(shape) + self.bias.view(shape)
        return outputs.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), share)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may hold the same tensor
        dist.all_reduce(gradient)
        return gradient
