"""Batches in shared memory: workers write into them, the trainer reads from them, nothing is copied on the way.

The memory is one anonymous mapping, made before the workers are forked. Having no name it takes nothing from /dev/shm
and cannot outlive its processes, however they end.
"""

import math
import mmap
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ssl_pipeline.data.errors import DataError

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of each tensor of a slot
Extra = TypeVar("Extra", covariant=True)

ALIGNMENT = 4096  # bytes between the starts of two tensors are a multiple of it
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


class Reader(Protocol[Extra]):
    """What a worker does: fill the tensors of a slot from the samples at some positions."""

    def layout(self) -> Layout:
        """The tensors of a slot, large enough for any batch."""
        ...

    def __call__(self, positions: Sequence[int], slot: Mapping[str, Tensor], /) -> Extra:
        """Write into `slot`, which holds an older batch. What is returned goes through a pipe: little, no tensors."""
        ...


class Slots:
    """Room for `count` batches of one layout in one block of shared memory.

    `tensors[slot]` are views of the block. A slot that is given back is free at once, or, where CUDA is in use, once
    the current stream has come to this point: copies to the device may run in the background until then.
    """

    def __init__(self, layout: Layout, count: int) -> None:
        places, size = _places(layout)
        try:
            memory = mmap.mmap(-1, max(count * size, 1))  # lives as long as a view of it
        except (OSError, OverflowError) as error:
            raise DataError(
                f"Cannot reserve {count * size / 1e9:.3g} GB for {count} batches: {error}. "
                "Try fewer data.workers or a smaller data.prefetch."
            ) from None
        self.block = torch.frombuffer(memory, dtype=torch.uint8)
        self.tensors = [
            {name: _view(self.block, slot * size + places[name], *layout[name]) for name in layout}
            for slot in range(count)
        ]
        self._free = list(range(count))
        self._copying: deque[tuple[torch.cuda.Event, int]] = deque()
        self._page_locked = False

    def take(self, *, wait: bool) -> int | None:
        """A free slot, or None; if only copies in the background keep all of them, `wait` waits for the oldest."""
        while self._copying and (self._copying[0][0].query() or (wait and not self._free)):
            copied, slot = self._copying.popleft()
            copied.synchronize()
            self._free.append(slot)
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """The trainer is done with a slot, but for what its current CUDA stream has still to do."""
        if not torch.cuda.is_initialized():
            self._free.append(slot)
            return
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._copying.append((copied, slot))

    def lock_pages(self) -> None:
        """Where CUDA is in use, let copies to the device run in the background; without it they work, but wait."""
        if not torch.cuda.is_initialized():
            return
        error = int(torch.cuda.cudart().cudaHostRegister(self.block.data_ptr(), len(self.block), PORTABLE))
        self._page_locked = error == 0
        if error:
            with suppress(RuntimeError):  # CUDA reports the error once more, to whatever comes next: here, to nobody
                torch.zeros(1, device="cuda")
            gigabytes = len(self.block) / 1e9
            warnings.warn(f"Cannot page-lock {gigabytes:.3g} GB (CUDA error {error}): copies wait.", stacklevel=2)

    def unlock_pages(self) -> None:
        """Undo `lock_pages`, once the copies that are under way are done."""
        if self._page_locked:
            self._page_locked = False
            with suppress(RuntimeError):  # a device that failed copies nothing
                torch.cuda.current_stream().synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.block.data_ptr())


def slot_bytes(layout: Layout) -> int:
    """The memory that one slot takes."""
    return _places(layout)[1]


def _places(layout: Layout) -> tuple[dict[str, int], int]:
    """The byte at which each tensor of a slot begins, and at which the slot ends."""
    places, size = dict[str, int](), 0
    for name, (shape, dtype) in layout.items():
        places[name] = size
        size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return places, size


def _view(block: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
