"""Block-wise masks (BEiT, Bao et al., 2021, https://arxiv.org/abs/2106.08254), one at a time.

A mask is a number here: its lowest bit is the first patch, row by row. That makes a block one shift, and what it adds
one count of bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

# N masks, L patches row by row

ATTEMPTS = 10  # at one more block


@dataclass(frozen=True)
class Blocks:
    """What blocks may look like: areas in patches, logarithms of height / width.

    exact: whether patches at random make up for what the blocks leave.
    """

    smallest: float
    largest: float
    lowest: float
    highest: float
    exact: bool

    @classmethod
    def between(
        cls, min_block: int, max_block: float | None, min_aspect: float, max_aspect: float | None, *, exact: bool
    ) -> Blocks:
        """Without `max_block` there is no bound; `max_aspect` is 1 / min_aspect by default."""
        largest = math.inf if max_block is None else max_block
        highest = 1 / min_aspect if max_aspect is None else max_aspect
        return cls(min_block, largest, math.log(min_aspect), math.log(highest), exact)

    def draw(self, target: float, grid: tuple[int, int], uniform: Callable[[], float]) -> int:
        """A mask of at most `target` patches of a grid (rows, columns); `uniform` gives one number in [0, 1) after
        another.
        """
        mask, count = 0, 0
        while count < target:
            block = self._one(mask, min(target - count, self.largest), grid, uniform)
            if not block:
                break
            mask |= block
            count = mask.bit_count()
        if self.exact and count < int(target):
            free = [patch for patch in range(grid[0] * grid[1]) if not mask >> patch & 1]
            for _ in range(int(target) - count):
                mask |= 1 << free.pop(int(uniform() * len(free)))
        return mask

    def _one(self, mask: int, largest: float, grid: tuple[int, int], uniform: Callable[[], float]) -> int:
        """A block that adds to the mask, at most `largest` patches; 0 if ten attempts make none."""
        rows, columns = grid
        for _ in range(ATTEMPTS):
            area = self.smallest + (largest - self.smallest) * uniform()
            aspect = math.exp(self.lowest + (self.highest - self.lowest) * uniform())
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < rows and width < columns:
                top, left = int(uniform() * (rows - height + 1)), int(uniform() * (columns - width + 1))
                block = ((1 << width) - 1) * _first_column(height, columns) << (top * columns + left)
                if 0 < (block & ~mask).bit_count() <= largest:
                    return block
        return 0


@cache
def _first_column(height: int, columns: int) -> int:
    """The first `height` patches of the first column."""
    return sum(1 << row * columns for row in range(height))


def as_bools(masks: Sequence[int], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """N masks as (N, L)."""
    num_patches = grid[0] * grid[1]
    num_bytes = -(-num_patches // 8)
    rows = np.frombuffer(b"".join(mask.to_bytes(num_bytes, "little") for mask in masks), np.uint8)
    bits = np.unpackbits(rows.reshape(len(masks), num_bytes), axis=1, count=num_patches, bitorder="little")
    return bits.view(np.bool_)
