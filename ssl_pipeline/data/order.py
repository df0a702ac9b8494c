"""Which rank reads which sample when: a pure function of (seed, position), from SplitMix64 (Steele et al., OOPSLA
2014)."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl_pipeline.randomness import SAMPLE_ORDER, SHARD_ORDER, permutation

CACHED_EPOCHS = 2  # a batch may straddle the end of an epoch
CACHED_BLOCKS = 4


def rank_positions(position: int, *, rank: int, world_size: int, batch_size: int) -> range:
    """Positions that a rank reads of the micro-batch [position, position + batch_size * world_size)."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size={world_size}). Got {rank}.")
    first = position + rank * batch_size
    return range(first, first + batch_size)


class Order:
    """An endless order of samples: in each epoch every sample once.

    Shards are permuted by (seed, epoch), then the samples within each block of `block_shards` shards, so that a
    reader works on few shards at a time. Position p is place p % N of epoch p // N; blocks are worked out on demand.
    """

    def __init__(self, shard_counts: ArrayLike, seed: int, block_shards: int = 16) -> None:
        self.counts = np.asarray(shard_counts, dtype=np.int64)
        self.seed = seed
        self.block_shards = block_shards
        self.num_samples = int(self.counts.sum())
        if self.num_samples == 0:
            raise ValueError("An order needs at least one sample. Got none.")
        if block_shards < 1:
            raise ValueError(f"block_shards must be at least 1. Got {block_shards}.")
        self._first_sample = np.cumsum(self.counts) - self.counts
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def locate(self, positions_B: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch and sample id at each position: two arrays (B,)."""
        positions_B = np.asarray(positions_B, dtype=np.int64)
        epochs_B, places_B = np.divmod(positions_B, self.num_samples)
        samples_B = np.empty_like(places_B)
        for epoch in np.unique(epochs_B).tolist():
            in_epoch_B = epochs_B == epoch
            block_ends = self._shards_of(epoch)[1]
            blocks_B = np.where(in_epoch_B, np.searchsorted(block_ends, places_B, side="right"), -1)
            for block in np.unique(blocks_B[in_epoch_B]).tolist():
                here_B = blocks_B == block
                start = block_ends[block - 1] if block else 0
                samples_B[here_B] = self._samples_of(epoch, block)[places_B[here_B] - start]
        return epochs_B, samples_B

    def _shards_of(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards of an epoch in their order, and the place after each block's last sample."""
        if epoch not in self._epochs:
            shards = permutation(len(self.counts), self.seed, SHARD_ORDER, epoch)
            shard_ends = np.cumsum(self.counts[shards])
            lasts = np.arange(self.block_shards - 1, len(shards) + self.block_shards - 1, self.block_shards)
            self._epochs[epoch] = shards, shard_ends[np.minimum(lasts, len(shards) - 1)]
            if len(self._epochs) > CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _samples_of(self, epoch: int, block: int) -> NDArray[np.int64]:
        """Sample ids of a block in their order."""
        if (epoch, block) not in self._blocks:
            shards = self._shards_of(epoch)[0][block * self.block_shards : (block + 1) * self.block_shards]
            parts = [np.arange(self.counts[shard]) + self._first_sample[shard] for shard in shards]
            samples = np.concatenate(parts)
            self._blocks[epoch, block] = samples[permutation(len(samples), self.seed, SAMPLE_ORDER, epoch, block)]
            if len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[epoch, block]
