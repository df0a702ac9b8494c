"""Which patches of a view are masked: at random, in square units or in rectangular blocks.

`random_mask`, `simmim_mask`, `blockwise_mask` and `mask_counts` take their random numbers from the caller. The data
path calls `draw_masks`, which takes them from the sample: the same algorithms, and the same masks on any process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment.blocks import Blocks, as_bools
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.randomness import generate_uniforms

# N images, L patches row by row, U units; V views of each of B images. Masks are bool, True = masked.

NUMBERS_AT_ONCE = 96  # uniforms that a block mask takes at a time: as many as most of them need
WHETHER, RATIO, PATTERN = 0, 1, 2  # what the first numbers of a view's generator decide; the pattern takes all others


def random_mask(noise_NL: Tensor, *, num_masked: int) -> Tensor:
    """(N, L): of each image the `num_masked` patches of smallest noise (MAE, https://arxiv.org/abs/2111.06377)."""
    if noise_NL.ndim != 2 or not 0 <= num_masked <= noise_NL.shape[1]:
        raise ValueError(
            f"random_mask needs noise (N, L) and num_masked from 0 to L. Got {tuple(noise_NL.shape)} and {num_masked}."
        )
    return _smallest(noise_NL, torch.full((len(noise_NL),), num_masked, device=noise_NL.device))


def simmim_mask(noise_NU: Tensor, *, grid: tuple[int, int], unit: int, ratio: float) -> Tensor:
    """(N, L): of each image the ceil(U * ratio) units of smallest noise (SimMIM, https://arxiv.org/abs/2111.09886).

    A unit is a square of `unit` x `unit` patches of the `grid` (rows, columns); U = rows * columns / unit^2.
    """
    _check_units(grid, unit)
    num_units = grid[0] * grid[1] // unit**2
    if noise_NU.ndim != 2 or noise_NU.shape[1] != num_units or not 0 <= ratio <= 1:
        raise ValueError(
            f"simmim_mask needs noise (N, {num_units}) for a grid of {grid[0]} x {grid[1]} patches in units of {unit}, "
            f"and a ratio in [0, 1]. Got {tuple(noise_NU.shape)} and {ratio}."
        )
    counts_N = torch.full((len(noise_NU),), math.ceil(num_units * ratio), device=noise_NU.device)
    return _patches_of_units(_smallest(noise_NU, counts_N), grid, unit)


def blockwise_mask(
    num_masked: Sequence[float],
    grid: tuple[int, int],
    *,
    generator: torch.Generator,
    min_block: int = 4,
    max_block: float | None = None,
    min_aspect: float = 0.3,
    max_aspect: float | None = None,
    exact: bool = False,
) -> Tensor:
    """(N, L) of rectangular blocks, for the N targets `num_masked` (BEiT, https://arxiv.org/abs/2106.08254).

    Blocks are added until the target is reached: the area uniform from `min_block` to the patches that are still
    missing, at most `max_block` of them; height / width log-uniform from `min_aspect` to `max_aspect` (None:
    1 / min_aspect); both sides rounded, and smaller than the grid's; the place uniform. A block counts if it adds a
    patch, and no more than the largest area that it could have had. After ten that do not count the mask stays as it
    is: never above its target, now and then some patches below. `exact` adds these at random, up to the integer part
    of the target. A target of 0 gives no mask.
    """
    rows, columns = grid
    wrong = [target for target in num_masked if not 0 <= target <= rows * columns]
    if wrong:
        raise ValueError(f"num_masked must lie between 0 and {rows} * {columns} patches. Got {wrong[0]:g}.")
    if not 0 < min_aspect <= (max_aspect or 1 / min_aspect):
        raise ValueError(f"aspects must be an increasing pair above 0. Got {min_aspect} and {max_aspect}.")
    blocks = Blocks.between(min_block, max_block, min_aspect, max_aspect, exact=exact)

    def numbers() -> Iterator[float]:
        while True:
            yield from torch.rand(NUMBERS_AT_ONCE, generator=generator, dtype=torch.float64).tolist()

    uniform = numbers().__next__
    return torch.from_numpy(as_bools([blocks.draw(target, grid, uniform) for target in num_masked], grid))


def mask_counts(
    num_images: int,
    num_patches: int,
    *,
    ratio: tuple[float, float],
    probability: float,
    generator: torch.Generator,
) -> Tensor:
    """(num_images,) int64 on the host: how many patches of each image are masked (DINOv2, arXiv:2304.07193).

    Exactly int(num_images * probability) images get a mask. Their ratios are stratified, one uniform in each of as
    many equal parts of `ratio` = (low, high); count = int(ratio * num_patches). All counts, zeros included, are in
    random order.
    """
    low, high = ratio
    if not (0 <= low <= high <= 1 and 0 <= probability <= 1):
        raise ValueError(
            "mask_counts needs an increasing pair of ratios and a probability, all in [0, 1]. "
            f"Got {ratio} and {probability}."
        )
    uniforms = torch.rand(2 * num_images, generator=generator, dtype=torch.float64).numpy()
    return torch.from_numpy(_stratified_counts(uniforms, num_patches, ratio, probability))


def draw_masks(
    rule: MaskRule, size: int, states_VB: NDArray[np.uint64], *, counts_VB: NDArray[np.int64] | None = None
) -> NDArray[np.bool_]:
    """(V, B, L) for views of `size` pixels; each follows only from its own state of SplitMix64.

    counts_VB: how many patches of each view are masked, where a view does not decide for itself (`rule.stratified`).
    """
    grid, states_N = grid_of(rule, size), states_VB.reshape(-1)
    num_patches = grid[0] * grid[1]
    if counts_VB is None:
        targets_N = _own_targets(rule, num_patches, states_N)
    else:
        targets_N = counts_VB.reshape(-1).astype(np.float64)
    if rule.kind == "blocks":
        masks_NL = _drawn_blocks(rule, grid, states_N, targets_N)
    elif rule.kind == "units":
        num_units = num_patches // rule.unit**2
        noise_NU = torch.from_numpy(generate_uniforms(states_N, num_units, start=PATTERN))
        units_NU = _smallest(noise_NU, torch.from_numpy(np.ceil(targets_N / rule.unit**2)))
        masks_NL = _patches_of_units(units_NU, grid, rule.unit).numpy()
    else:
        noise_NL = torch.from_numpy(generate_uniforms(states_N, num_patches, start=PATTERN))
        masks_NL = _smallest(noise_NL, torch.from_numpy(targets_N)).numpy()
    return masks_NL.reshape(*states_VB.shape, num_patches)


def draw_counts(rule: MaskRule, size: int, num_views: int, state: NDArray[np.uint64]) -> NDArray[np.int64]:
    """`mask_counts` of all views of an optimizer step, from one state of SplitMix64: (num_views,)."""
    rows, columns = grid_of(rule, size)
    uniforms = generate_uniforms(state, 2 * num_views)
    return _stratified_counts(uniforms, rows * columns, ratio=_as_pair(rule.ratio), probability=rule.probability)


def grid_of(rule: MaskRule, size: int) -> tuple[int, int]:
    """Rows and columns of patches of a view of `size` pixels; raises ValueError if they do not fit."""
    side, rest = divmod(size, rule.patch_size)
    if rest or not side:
        raise ValueError(f"views with masks need a size that is a multiple of {rule.patch_size} pixels. Got {size}.")
    if rule.kind == "units":
        _check_units((side, side), rule.unit)
    return side, side


def _own_targets(rule: MaskRule, num_patches: int, states_N: NDArray[np.uint64]) -> NDArray[np.float64]:
    """How many patches each view masks (N,), by its own numbers; 0 for no mask."""
    first_N2 = generate_uniforms(states_N, PATTERN)
    low, high = _as_pair(rule.ratio)
    ratios_N = low + (high - low) * first_N2[:, RATIO]
    if rule.kind == "units":
        targets_N = np.ceil(num_patches // rule.unit**2 * ratios_N) * rule.unit**2
    elif rule.kind == "random":
        targets_N = num_patches - np.floor(num_patches * (1 - ratios_N))
    else:
        targets_N = np.full(len(states_N), rule.num_masked) if rule.num_masked is not None else num_patches * ratios_N
    return np.where(first_N2[:, WHETHER] < rule.probability, targets_N, 0.0)


def _as_pair(ratio: float | tuple[float, float]) -> tuple[float, float]:
    return ratio if isinstance(ratio, tuple) else (ratio, ratio)


def _stratified_counts(
    uniforms: NDArray[np.float64], num_patches: int, ratio: tuple[float, float], probability: float
) -> NDArray[np.int64]:
    """The counts of `mask_counts` for N images from 2 N uniforms: the ratios' and the order's."""
    within_N, order_N = np.split(uniforms, 2)
    num_masked = int(len(within_N) * probability)
    low, high = ratio
    parts = (np.arange(num_masked) + within_N[:num_masked]) / max(num_masked, 1)
    counts_N = np.zeros(len(within_N), np.int64)
    counts_N[:num_masked] = (low + (high - low) * parts) * num_patches
    return counts_N[np.argsort(order_N, kind="stable")]


def _smallest(noise_NL: Tensor, counts_N: Tensor) -> Tensor:
    """(N, L): True for the `counts_N` smallest of each row."""
    order_NL = torch.argsort(noise_NL, dim=1, stable=True)
    chosen_NL = torch.arange(noise_NL.shape[1], device=noise_NL.device) < counts_N[:, None]
    return torch.zeros_like(chosen_NL).scatter_(1, order_NL, chosen_NL)


def _patches_of_units(units_NU: Tensor, grid: tuple[int, int], unit: int) -> Tensor:
    """(N, U) of units -> (N, L) of the patches in them."""
    square = units_NU.unflatten(1, (grid[0] // unit, grid[1] // unit))
    return square.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2).flatten(1)


def _check_units(grid: tuple[int, int], unit: int) -> None:
    if unit < 1 or grid[0] % unit or grid[1] % unit:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} patches has no units of {unit} x {unit} patches.")


def _drawn_blocks(
    rule: MaskRule, grid: tuple[int, int], states_N: NDArray[np.uint64], targets_N: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """(N, L) of blocks; the first numbers of all views come at once, later ones when a view needs them."""
    blocks = Blocks.between(rule.min_block, rule.max_block, rule.min_aspect, rule.max_aspect, exact=rule.exact)
    first = generate_uniforms(states_N, NUMBERS_AT_ONCE, start=PATTERN).tolist()

    def numbers(view: int) -> Iterator[float]:
        yield from first[view]
        for start in itertools.count(PATTERN + NUMBERS_AT_ONCE, NUMBERS_AT_ONCE):
            yield from generate_uniforms(states_N[view], NUMBERS_AT_ONCE, start=start).tolist()

    masks = [blocks.draw(target, grid, numbers(view).__next__) for view, target in enumerate(targets_N.tolist())]
    return as_bools(masks, grid)
