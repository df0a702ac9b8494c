"""Patches and random masks."""

import pytest
import torch

from ssl_pipeline.backbones.patches import patchify, random_masking, split_by_mask, take_patches, unpatchify


def test_patches_go_by_rows_and_their_pixels_by_row_column_channel():
    images = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)  # channel 0 holds 0 ... 23, channel 1 holds 24 ... 47
    patches = patchify(images, 2)
    assert patches.shape == (1, 6, 8)
    assert patches[0, 0].tolist() == [0, 24, 1, 25, 6, 30, 7, 31]
    assert patches[0, 1].tolist() == [2, 26, 3, 27, 8, 32, 9, 33]
    assert patches[0, 3].tolist() == [12, 36, 13, 37, 18, 42, 19, 43]


def test_unpatchify_is_the_inverse():
    square, wide = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 8)
    assert torch.equal(unpatchify(patchify(square, 4), 4), square)
    assert torch.equal(unpatchify(patchify(wide, 4), 4, grid=(1, 2)), wide)


def test_images_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match=r"divisible by 4. Got \(1, 3, 8, 6\)"):
        patchify(torch.ones(1, 3, 8, 6), 4)
    with pytest.raises(ValueError, match=r"Got \(1, 8, 12\)"):
        unpatchify(torch.ones(1, 8, 12), 2)


def test_the_patches_with_the_smallest_noise_are_kept():
    noise = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.0]])
    kept, mask, restore = random_masking(noise, ratio=0.5)
    assert kept.tolist() == [[1, 3], [3, 0]]
    assert mask.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert restore.tolist() == [[3, 0, 2, 1], [1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("num_patches", "ratio", "num_kept"), [(196, 0.75, 49), (64, 0.6, 25), (10, 0.33, 6), (4, 0.0, 4)]
)
def test_the_number_of_kept_patches_is_rounded_down(num_patches, ratio, num_kept):
    kept, mask, _ = random_masking(torch.rand(3, num_patches), ratio=ratio)
    assert kept.shape == (3, num_kept)
    assert mask.sum(dim=1).tolist() == [num_patches - num_kept] * 3


def test_restore_brings_the_patches_back_into_image_order():
    noise = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    kept, mask, restore = random_masking(noise, ratio=0.4)
    removed = mask.nonzero()[:, 1].reshape(5, -1)
    removed = removed.gather(1, noise.gather(1, removed).argsort(dim=1))
    shuffled = torch.cat([kept, removed], dim=1)
    assert torch.equal(shuffled.gather(1, restore), torch.arange(9).expand(5, -1))


def test_a_split_has_the_patches_of_each_kind_in_image_order():
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    kept, masked, restore = split_by_mask(mask, num_kept=2)
    assert kept.tolist() == [[1, 4], [0, 3]]
    assert masked.tolist() == [[0, 2, 3], [1, 2, 4]]
    assert torch.equal(torch.cat([kept, masked], dim=1).gather(1, restore), torch.arange(5).expand(2, 5))


def test_patches_are_taken_by_their_number():
    patches = torch.arange(12).reshape(2, 3, 2)
    assert take_patches(patches, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 75])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError, match=f"Got {ratio}"):
        random_masking(torch.rand(1, 4), ratio=ratio)
