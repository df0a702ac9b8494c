"""Random numbers that depend only on a key, from SplitMix64 (Steele et al., OOPSLA 2014)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)

SHARD_ORDER, SAMPLE_ORDER, AUGMENTATION, SUBSTITUTE, LABELLED, SPLIT, MASK, VIEW_SIZE, HOLDOUT, NOISE = (
    np.uint64(part) for part in range(1, 11)
)


def splitmix64(x: ArrayLike) -> NDArray[np.uint64]:
    """First output of the SplitMix64 generator seeded with `x`, element by element."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, dtype=np.uint64) + GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash64(*values: ArrayLike) -> NDArray[np.uint64]:
    """Hash of the values in their order; arrays broadcast against each other."""
    state = np.zeros((), dtype=np.uint64)
    for value in values:
        state = splitmix64(state ^ np.asarray(value).astype(np.uint64))
    return state


def generate(state: ArrayLike, count: int, *, start: int = 0) -> NDArray[np.uint64]:
    """Outputs `start` to `start + count - 1` of SplitMix64 from each state: (..., count)."""
    with np.errstate(over="ignore"):
        steps = np.arange(start, start + count, dtype=np.uint64) * GOLDEN_GAMMA
        return splitmix64(np.asarray(state, dtype=np.uint64)[..., None] + steps)


def generate_uniforms(state: ArrayLike, count: int, *, start: int = 0) -> NDArray[np.float64]:
    """The outputs of `generate` as numbers in [0, 1) with 53 random bits: (..., count)."""
    return (generate(state, count, start=start) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *key: ArrayLike) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on nothing but the key: no library, no platform, no version."""
    return np.argsort(generate(hash64(*key), count), kind="stable")


def uniforms(
    seed: int, epochs_B: ArrayLike, samples_B: ArrayLike, *, views: int, count: int, stream: int = 0
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits: (V, B, U), V = views, U = count.

    Those of a sample depend only on (seed, stream, epoch, sample id), never on its neighbours in the batch;
    `epochs_B` is one epoch or one per sample. View v reads numbers v*U to (v+1)*U of the sample's own generator.
    """
    states_B = hash64(seed, AUGMENTATION, stream, epochs_B, samples_B)
    return generate_uniforms(states_B, views * count).reshape(-1, views, count).swapaxes(0, 1)


def seed_everything(*key: int) -> None:
    """Seed the model's own randomness (drop path, dropout) from the step, so that nothing of it needs saving."""
    seed = int(hash64(*key)) >> 1
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def uniform_noise(keys_NA: torch.Tensor, count: int, *, dtype: torch.dtype) -> torch.Tensor:
    """Uniform numbers in (0, 1), exclusive, with 23 random bits, on the device of the keys: (N, count).

    Row n follows only from the integers keys_NA[n]: no generator, and the same on any process. Nothing waits for the
    device. A multiplicative hash of 32 bits, twice for each number; for noise, not for secrets.
    """
    state_N = torch.zeros_like(keys_NA[:, 0])
    for keys_N in keys_NA.unbind(dim=1):
        state_N = _mix((state_N ^ (keys_N & _32_BITS)) + _ODD)
    numbers = torch.arange(count, device=keys_NA.device) * _ODD + _ODD
    mixed = _mix(_mix((state_N[:, None] + numbers) & _32_BITS) ^ state_N[:, None])
    return (mixed >> 9).to(dtype).add_(0.5).mul_(2.0**-23)  # with 24 bits float32 would round up to 1


_32_BITS, _ODD, _FACTOR = 0xFFFFFFFF, 0x1E3779B9, 0x45D9F3B  # products of 32 bits and the factor fit into 63


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x & _32_BITS
    for _ in range(2):
        x = ((x ^ (x >> 16)) * _FACTOR) & _32_BITS
    return x ^ (x >> 16)
