"""A method on several processes: how it is wrapped, and its whole state wherever the parts of it lie.

Each process holds all of it now and averages gradients (DDP, https://arxiv.org/abs/2006.15704). What shards weights
later changes this module alone.
"""

from __future__ import annotations

import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

# gradients live in the buckets that are sent; monitors and checkpoints take the buffers of rank 0
DDP = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)


def wrap(
    accelerator: Accelerator, method: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The method as a step calls it, and its optimizer, for the processes and the precision of the accelerator."""
    register_forward_methods(method)
    with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers; Accelerate knows the old name alone
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        network, optimizer = accelerator.prepare(method, optimizer)
    return network, optimizer


def register_forward_methods(module: nn.Module) -> None:
    """Declare what is called on parts of a module besides `forward`: the names in their `forward_methods`.

    Where weights are sharded such a call gathers them first, as `forward` does; elsewhere this changes nothing.
    """
    for part in module.modules():
        for name in getattr(part, "forward_methods", ()):
            assert callable(getattr(part, name, None)), f"{type(part).__name__} has no method {name!r}"
            register_fsdp_forward_method(part, name)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module (the method, not its wrapper) with whole tensors; all processes call it together."""
    return module.state_dict()
