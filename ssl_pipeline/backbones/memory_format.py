"""The layout of a CNN's weights and images in memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

Network = TypeVar("Network", bound=nn.Module)


def choose_memory_format(model: nn.Module) -> torch.memory_format:
    """Bring a timm model into the layout in which its convolutions are fastest, and return it.

    Channels last: convolutions take a third of the time on CPUs, and less on GPUs too. A network that cannot take it
    (it asks for a `view` of what a convolution made, or has weights of five axes) keeps the usual layout.
    """
    if any(parameter.ndim == 5 for parameter in model.parameters()):
        return torch.contiguous_format
    if _fails(model, torch.channels_last) and not _fails(model, torch.contiguous_format):
        return torch.contiguous_format
    model.to(memory_format=torch.channels_last)
    return torch.channels_last


@torch.no_grad()
def _fails(model: nn.Module, memory_format: torch.memory_format) -> bool:
    """Whether a forward pass in this layout, of images of the network's own size, raises an error.

    Its tensors are torch's fake ones: they compute nothing, yet have the layout that the CPU's kernels would give them.
    """
    shape = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    fake = FakeTensorMode()
    own_log = logging.getLogger(FakeTensorMode.__module__)
    told, own_log.disabled = own_log.disabled, True  # it prints a traceback of what is caught here
    try:
        network = without_values(model, partial(_brought_into, memory_format, fake)).eval()
        with fake:
            network(torch.empty(2, *shape).contiguous(memory_format=memory_format))
    except Exception:  # whatever timm and torch raise
        return True
    finally:
        own_log.disabled = told
    return False


def _brought_into(memory_format: torch.memory_format, fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    image = fake.from_tensor(tensor)
    return image.contiguous(memory_format=memory_format) if image.ndim == 4 else image


def meta_copy(network: Network) -> Network:
    """A copy without memory: the tensors have shapes and no values."""
    return without_values(network, partial(torch.empty_like, device="meta"))


def without_values(network: Network, make: Callable[[Tensor], Tensor]) -> Network:
    """A copy with what `make` makes of each parameter and buffer in its place."""
    memo: dict[int, object] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(make(parameter.detach()), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = make(buffer)
    return copy.deepcopy(network, memo)
