"""Batches in shared memory: workers write into them, the trainer reads from them, nothing is copied on the way.

The memory is one anonymous mapping, made before the workers are forked. Having no name it takes nothing from /dev/shm
and cannot outlive its processes, however they end.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ssl_pipeline.config import without_number
from ssl_pipeline.data.errors import DataError

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of each tensor of a batch
Extra = TypeVar("Extra", covariant=True)

ALIGNMENT = 4096  # bytes between the starts of two tensors are a multiple of it
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


class Reader(Protocol[Extra]):
    """What a worker does: fill the tensors of a batch from the samples at some positions."""

    def layout(self, positions: Sequence[int] | None = None) -> Layout:
        """The tensors of the batch at these positions; without them, those of a usual batch, to plan memory by."""
        ...

    def __call__(self, positions: Sequence[int], tensors: Mapping[str, Tensor], /) -> Extra:
        """Write into `tensors`, which hold arbitrary values. The return value goes through a pipe: keep it small,
        without tensors."""
        ...


class Ring:
    """Shared memory of `size` bytes for at most `most` batches, each of which takes only what its layout needs.

    Places are taken one after another, at the end from the start again, and are given back in the same order. One that
    is given back is free at once, or, where CUDA is in use, once the current stream has come to this point: copies to
    the device may run in the background until then.
    """

    def __init__(self, size: int, most: int) -> None:
        try:
            memory = mmap.mmap(-1, max(size, 1))  # lives as long as a view of it
        except (OSError, OverflowError) as error:
            raise DataError(
                f"Cannot reserve {size / 1e9:.3g} GB for {most} batches: {without_number(error)}. "
                "Try a smaller data.batch_size, fewer data.workers or a smaller data.prefetch."
            ) from None
        self.block = torch.frombuffer(memory, dtype=torch.uint8)
        self.most = most
        self._taken: deque[tuple[int, int]] = deque()  # start and end, the oldest first
        self._copying: deque[torch.cuda.Event] = deque()  # of as many of the oldest
        self._page_locked = False

    def take(self, size: int, *, wait: bool) -> int | None:
        """The first byte of a place for `size` bytes, or None; if copies in the background keep it, `wait` waits."""
        while self._copying and self._copying[0].query():
            self._free_oldest()
        while (start := self._place_for(size)) is None and wait and self._copying:
            self._free_oldest()
        if start is not None:
            self._taken.append((start, start + size))
        return start

    def give_back(self) -> None:
        """The trainer is done with its oldest batch, except for what its current CUDA stream has still to do."""
        if not torch.cuda.is_initialized():
            self._taken.popleft()
            return
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._copying.append(copied)

    def _free_oldest(self) -> None:
        self._copying.popleft().synchronize()
        self._taken.popleft()

    def _place_for(self, size: int) -> int | None:
        if not self._taken:
            return 0 if size <= len(self.block) else None
        if len(self._taken) == self.most:
            return None
        (first, _), (last, end) = self._taken[0], self._taken[-1]
        if last < first:  # the free bytes lie between the newest and the oldest
            return end if end + size <= first else None
        if end + size <= len(self.block):
            return end
        return 0 if size <= first else None

    def lock_pages(self) -> None:
        """Where CUDA is in use, let copies to the device run in the background; without it they work, but wait."""
        if not torch.cuda.is_initialized():
            return
        error = int(torch.cuda.cudart().cudaHostRegister(self.block.data_ptr(), len(self.block), PORTABLE))
        self._page_locked = error == 0
        if error:
            with suppress(RuntimeError):  # CUDA reports the error once more at the next call: clear it here
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


def batch_bytes(layout: Layout) -> int:
    """The memory that a batch takes."""
    return sum(_padded(shape, dtype) for shape, dtype in layout.values())


def tensors_at(block: Tensor, start: int, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a batch that begins at byte `start` of a flat block of bytes, as views of it."""
    tensors = {}
    for name, (shape, dtype) in layout.items():
        tensors[name] = block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        start += _padded(shape, dtype)
    return tensors


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
