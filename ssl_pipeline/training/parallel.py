"""A method on several processes: how a step calls it, and its optimizer."""

from __future__ import annotations

import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

# gradients live in the buckets that are sent; monitors and checkpoints take the buffers of rank 0
DDP = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)


def wrap(
    accelerator: Accelerator, method: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The method as a step calls it, and its optimizer, for the processes and the precision of the accelerator.

    A method that is not `sharded` lies whole on each process, and its gradients are averaged
    (DDP, https://arxiv.org/abs/2006.15704).
    """
    if sharded:  # it averages them itself
        network = accelerator.prepare_model(method, device_placement=False, evaluation_mode=True)
        return network, accelerator.prepare_optimizer(optimizer, device_placement=False)
    with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers; Accelerate knows only the old name
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        network, optimizer = accelerator.prepare(method, optimizer)
    return network, optimizer
