"""Tensors of which each process holds some rows (FSDP2's DTensor); every other tensor is whole on each process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in place: its rows of a sharded one, maybe none; otherwise the tensor
    itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each: for what is done element by element, or row by row."""
    return [local(tensor) for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on each process; all of them call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that each process holds whole, sharded over the processes like `like`, of the same shape.

    Nothing is sent: process r of n keeps the rows from r * ceil(rows / n) on, as torch.chunk counts them.
    """
    if not isinstance(like, DTensor):
        return tensor
    size = -(-len(tensor) // like.device_mesh.size())
    first = size * like.device_mesh.get_local_rank()
    rows = tensor[first : first + size].to(like.device)
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, (number of tensors,); one collective if they are sharded."""
    own = torch.stack(torch._foreach_norm(local_parts(tensors)))
    if not any(map(is_sharded, tensors)):
        return own
    squares = own.double().square()
    dist.all_reduce(squares)
    return squares.sqrt().to(own.dtype)
