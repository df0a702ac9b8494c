"""Do all processes hold the same weights? Checked now and then by a hash of each tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones.networks import batch_norms
from ssl_pipeline.config import RunError
from ssl_pipeline.distributed import gather, world_size

SLAB = 1 << 22  # elements that are hashed at a time: 32 MB
GAMMA, ROUNDS = -7046029254386353131, ((30, -4658895280553007687), (27, -7723592293110705685))  # SplitMix64's
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RankChecks:
    """Compares the weights of all processes every `every` steps; 0: never, and a single process has nothing to compare.

    Compared are parameters and buffers, but not the statistics of batch norm, which belong to each process, nor
    tensors of which each process holds a part.
    """

    def __init__(self, module: nn.Module, *, every: int) -> None:
        self._every = every if world_size() > 1 else 0
        self._equal_after = 0
        own = {id(buffer) for part in batch_norms(module) for buffer in part.buffers(recurse=False)}
        self._tensors = [
            (name, tensor)
            for name, tensor in _named_tensors(module)
            if id(tensor) not in own and not hasattr(tensor, "to_local")  # of a DTensor
        ]

    def look(self, step: int) -> None:
        """Compare after `step` optimizer steps, if it is time. Raises RunError, on all processes, if some differ."""
        if not self._every or step % self._every or not self._tensors:
            return
        hashes_WT = gather(torch.stack([hash_of(tensor) for _, tensor in self._tensors])[None]).cpu()
        differs_T = (hashes_WT != hashes_WT[0]).any(dim=0)
        if differs_T.any():
            first = int(differs_T.int().argmax())
            rank = int((hashes_WT[:, first] != hashes_WT[0, first]).int().argmax())
            since = f"after step {self._equal_after}" if self._equal_after else "at the start of this run"
            raise RunError(
                f"The processes have diverged: after step {step} '{self._tensors[first][0]}' of rank {rank} differs "
                f"from that of rank 0 ({int(differs_T.sum())} of {len(self._tensors)} tensors differ). They were last "
                f"known to be equal {since}: later checkpoints have only rank 0's weights. Look for a broken GPU, for "
                "code that is not the same everywhere, or for a method that draws random numbers by rank."
            )
        self._equal_after = step


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


@torch.no_grad()
def hash_of(tensor: Tensor) -> Tensor:
    """A number () int64 of the bits of a tensor, on its device: another one for other bits, except by rare chance."""
    flat = tensor.detach().reshape(-1)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    bits = flat.view(INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), SLAB):
        part = bits[start : start + SLAB].long()
        places = torch.arange(start + 1, start + 1 + len(part), device=tensor.device)
        mixed = part + places * GAMMA
        for shift, multiplier in ROUNDS:
            mixed = (mixed ^ (mixed >> shift)) * multiplier
        total += (mixed ^ (mixed >> 31)).sum()
    return total
