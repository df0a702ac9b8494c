"""Masks over patches: toy numbers, the papers' loops, and what is promised of every mask."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from ssl_pipeline.augment.masks import (
    NUMBERS_AT_ONCE,
    PATTERN,
    blockwise_mask,
    draw_counts,
    draw_masks,
    grid_of,
    mask_counts,
    random_mask,
    simmim_mask,
)
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.randomness import generate_uniforms, hash64

BEIT = {"min_block": 16}
IBOT = {"min_block": 16}  # (14 // 3)^2
DINOV2 = {"max_block": 98}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def states(samples=64, views=1, seed=0):
    return hash64(seed, np.arange(samples), np.arange(views)[:, None])


def test_the_patches_of_smallest_noise_are_masked():
    noise = torch.tensor([[0.3, 0.1, 0.2, 0.9], [0.5, 0.5, 0.5, 0.1]])
    assert random_mask(noise, num_masked=2).int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert not random_mask(noise, num_masked=0).any()
    assert random_mask(noise, num_masked=4).all()


def test_units_are_masked_whole():
    noise = torch.tensor([[0.9, 0.1, 0.8, 0.7, 0.6, 0.2]])  # of 2 x 3 units of 2 x 2 patches
    mask = simmim_mask(noise, grid=(4, 6), unit=2, ratio=0.3)  # ceil(1.8) = 2
    assert mask.view(4, 6).int().tolist() == [[0, 0, 1, 1, 0, 0]] * 2 + [[0, 0, 0, 0, 1, 1]] * 2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: random_mask(torch.rand(2, 4), num_masked=5), r"num_masked from 0 to L. Got \(2, 4\) and 5"),
        (
            lambda: simmim_mask(torch.rand(2, 4), grid=(4, 5), unit=2, ratio=0.5),
            r"a grid of 4 x 5 patches has no units",
        ),
        (lambda: simmim_mask(torch.rand(2, 5), grid=(4, 4), unit=2, ratio=0.5), r"needs noise \(N, 4\)"),
        (lambda: simmim_mask(torch.rand(2, 4), grid=(4, 4), unit=2, ratio=1.5), r"a ratio in \[0, 1\]. Got .* and 1.5"),
        (lambda: blockwise_mask([17], (4, 4), generator=generator()), r"between 0 and 4 \* 4 patches. Got 17"),
        (lambda: blockwise_mask([4], (4, 4), generator=generator(), min_aspect=0.0), r"pair above 0. Got 0.0 and None"),
        (
            lambda: mask_counts(4, 16, ratio=(0.5, 0.1), probability=0.5, generator=generator()),
            r"an increasing pair of ratios and a probability, all in \[0, 1\]. Got \(0.5, 0.1\) and 0.5",
        ),
        (lambda: grid_of(MaskRule("random", 16), 100), r"a multiple of 16 pixels. Got 100"),
        (lambda: grid_of(MaskRule("units", 4, unit=3), 16), r"no units of 3 x 3 patches"),
    ],
)
def test_what_does_not_fit_is_told(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def blocks_in_a_loop(target, grid, numbers, *, min_block=4, max_block=None, min_aspect=0.3, max_aspect=None):
    """Block-wise masking as BEiT's text has it, patch by patch on an array."""
    rows, columns = grid
    mask, count = np.zeros(grid, bool), 0
    while count < target:
        missing = min(target - count, max_block or math.inf)
        for _ in range(10):
            area = min_block + (missing - min_block) * next(numbers)
            bounds = math.log(min_aspect), math.log(max_aspect or 1 / min_aspect)
            aspect = math.exp(bounds[0] + (bounds[1] - bounds[0]) * next(numbers))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = int(next(numbers) * (rows - height + 1)), int(next(numbers) * (columns - width + 1))
            new = [
                (row, column)
                for row in range(top, top + height)
                for column in range(left, left + width)
                if not mask[row, column]
            ]
            if 0 < len(new) <= missing:
                for place in new:
                    mask[place] = True
                count += len(new)
                break
        else:
            break
    return mask


@pytest.mark.parametrize(
    ("grid", "shape"), [((14, 14), BEIT), ((16, 16), DINOV2), ((7, 12), {"min_aspect": 0.5, "max_aspect": 1.5})]
)
def test_blocks_equal_the_loop_over_patches(grid, shape):
    targets = [75, 0, 40.7, 3, *np.random.default_rng(0).uniform(0, 80, 40).tolist()]
    masks = blockwise_mask(targets, grid, generator=generator(3), **shape)
    numbers = generator(3)
    stream = (
        n for _ in range(200) for n in torch.rand(NUMBERS_AT_ONCE, generator=numbers, dtype=torch.float64).tolist()
    )
    expected = [blocks_in_a_loop(target, grid, stream, **shape) for target in targets]
    assert masks.dtype == torch.bool
    assert masks.tolist() == [mask.ravel().tolist() for mask in expected]


def test_a_target_is_never_exceeded_and_missed_by_little():
    targets = np.random.default_rng(0).uniform(0.1 * 196, 0.5 * 196, 400)
    for shape in (BEIT, IBOT, DINOV2):
        counts = blockwise_mask(targets.tolist(), (14, 14), generator=generator(), **shape).sum(dim=1).numpy()
        assert (counts <= targets).all()
        assert np.mean(targets - counts) < 3
    assert not blockwise_mask([0, 0.0], (14, 14), generator=generator()).any()


def test_exact_masks_have_the_integer_part_of_the_target_and_begin_with_the_blocks():
    targets = [75, 75, 60.9, 0, 3, 195]
    plain = [blockwise_mask([target], (14, 14), generator=generator(), **BEIT) for target in targets]
    exact = [blockwise_mask([target], (14, 14), generator=generator(), exact=True, **BEIT) for target in targets]
    assert [int(mask.sum()) for mask in exact] == [75, 75, 60, 0, 3, 195]
    assert all((mask <= more).all() for mask, more in zip(plain, exact, strict=True))


def test_counts_are_stratified_and_in_random_order():
    counts = mask_counts(200, 10_000, ratio=(0.1, 0.5), probability=0.25, generator=generator())
    assert counts.dtype == torch.int64
    masked = np.sort(counts[counts > 0].numpy())
    assert len(masked) == 50
    bounds = 1_000 + 80 * np.arange(51)  # one in each fiftieth of 0.1 to 0.5
    assert ((bounds[:-1] <= masked) & (masked < bounds[1:])).all()
    assert (
        counts.tolist() != mask_counts(200, 10_000, ratio=(0.1, 0.5), probability=0.25, generator=generator(1)).tolist()
    )
    order = np.argsort(counts[counts > 0].numpy())
    assert abs(np.corrcoef(order, np.arange(50))[0, 1]) < 0.4
    assert mask_counts(7, 16, ratio=(0.1, 0.5), probability=0.1, generator=generator()).tolist() == [0] * 7
    assert mask_counts(3, 10, ratio=(0.5, 0.5), probability=1.0, generator=generator()).tolist() == [5, 5, 5]


# what the data path draws


def test_a_mask_depends_on_its_own_state_alone():
    rules = (
        MaskRule("random", 4, ratio=(0.2, 0.8), probability=0.7),
        MaskRule("units", 4, ratio=0.6, unit=2),
        MaskRule("blocks", 4, ratio=(0.1, 0.5), probability=0.5),
    )
    of = states(views=2)
    for rule in rules:
        whole = draw_masks(rule, 32, of)
        assert whole.shape == (2, 64, 64)
        assert (draw_masks(rule, 32, of[:, 10:20]) == whole[:, 10:20]).all()
        assert (draw_masks(rule, 32, of[1:, ::3]) == whole[1:, ::3]).all()
        assert len(np.unique(whole.reshape(-1, 64), axis=0)) > 40


@pytest.mark.parametrize(("ratio", "masked"), [(0.75, 147), (0.6, 118), (0.0, 0)])
def test_random_masks_keep_the_integer_part_of_what_is_left(ratio, masked):
    counts = draw_masks(MaskRule("random", 16, ratio=ratio), 224, states()).sum(axis=-1)
    assert (counts == masked).all()
    assert masked == 196 - int(196 * (1 - ratio))


def test_random_masks_are_those_of_the_noise():
    of = states(5)
    noise = torch.from_numpy(generate_uniforms(of[0], 16, start=PATTERN))
    expected = random_mask(noise, num_masked=12).tolist()
    assert draw_masks(MaskRule("random", 4, ratio=0.75), 16, of)[0].tolist() == expected


def test_units_are_those_of_the_noise():
    of = states(5)
    noise = torch.from_numpy(generate_uniforms(of[0], 9, start=PATTERN))
    expected = simmim_mask(noise, grid=(6, 6), unit=2, ratio=0.6).tolist()  # ceil(5.4) = 6 units
    assert draw_masks(MaskRule("units", 4, ratio=0.6, unit=2), 24, of)[0].tolist() == expected


@pytest.mark.parametrize(
    "rule", [MaskRule("blocks", 16, num_masked=75, min_block=16), MaskRule("blocks", 16, ratio=0.4)]
)
def test_blocks_are_those_of_the_loop(rule):
    of = states(20)
    expected = [
        blocks_in_a_loop(rule.num_masked or 0.4 * 196, (14, 14), iter(numbers), min_block=rule.min_block)
        for numbers in generate_uniforms(of[0], 2_000, start=PATTERN)
    ]
    assert draw_masks(rule, 224, of)[0].tolist() == [mask.ravel().tolist() for mask in expected]


def test_a_share_of_the_views_is_masked_with_ratios_uniform_in_their_range():
    counts = draw_masks(MaskRule("random", 1, ratio=(0.2, 0.8), probability=0.5), 32, states(2_000)).sum(axis=-1)[0]
    masked = counts[counts > 0]
    assert abs(len(masked) / 2_000 - 0.5) < 0.04
    assert kstest(masked / 1024, "uniform", (0.2, 0.6)).pvalue > 1e-3


def test_every_patch_of_a_random_mask_is_equally_likely():
    masks = draw_masks(MaskRule("random", 4, ratio=0.5), 16, states(4_000))
    assert chisquare(masks[0].sum(axis=0)).pvalue > 1e-3


def test_counts_of_a_step_are_taken_where_they_are_given():
    rule = MaskRule("blocks", 16, ratio=(0.1, 0.5), probability=0.5, stratified=True)
    counts = draw_counts(rule, 224, 64, hash64(0, 1))
    assert (counts > 0).sum() == 32
    masked = draw_masks(rule, 224, states(32, views=2), counts_VB=counts.reshape(2, 32)).sum(axis=-1).ravel()
    assert (masked <= counts).all()
    assert (masked[counts > 0] > 0).all()
    for kind in ("random", "units"):
        exact = draw_masks(MaskRule(kind, 16), 224, states(32, views=2), counts_VB=counts.reshape(2, 32))
        assert (exact.sum(axis=-1).ravel() == counts).all()
