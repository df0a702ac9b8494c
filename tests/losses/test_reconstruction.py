"""MAE's loss against loops over patches and pixels."""

import pytest
import torch

from ssl_pipeline.backbones.patches import patchify, split_by_mask, take_patches
from ssl_pipeline.losses import mae_loss, removed_patches_loss


def random_inputs():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    prediction = torch.randn(2, 6, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    return images, prediction, mask


@pytest.mark.parametrize("normalize_targets", [False, True])
def test_mae_loss_and_its_gradient_equal_the_loop(normalize_targets):
    images, prediction, mask = random_inputs()
    errors = []
    for n in range(2):
        for row in range(2):
            for column in range(3):
                if mask[n, row * 3 + column] == 0:
                    continue
                patch = images[n, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                target = torch.stack([patch[c, y, x] for y in range(2) for x in range(2) for c in range(3)])
                if normalize_targets:
                    variance = ((target - target.mean()) ** 2).sum() / (len(target) - 1)
                    target = (target - target.mean()) / torch.sqrt(variance + 1e-6)
                errors.append(((prediction[n, row * 3 + column] - target) ** 2).mean())
    expected = torch.stack(errors).mean()
    loss = mae_loss(images, prediction, mask, patch_size=2, normalize_targets=normalize_targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, prediction), torch.autograd.grad(expected, prediction))


def test_kept_patches_do_not_count():
    images, prediction, mask = random_inputs()
    loss = mae_loss(images, prediction, mask, patch_size=2, normalize_targets=False)
    changed = prediction.detach() + 100 * (1 - mask)[:, :, None]
    torch.testing.assert_close(mae_loss(images, changed, mask, patch_size=2, normalize_targets=False), loss.detach())


def test_a_uniform_patch_has_a_finite_target():
    images, prediction, mask = torch.full((1, 1, 2, 2), 0.3), torch.ones(1, 1, 4), torch.ones(1, 1)
    loss = mae_loss(images, prediction, mask, patch_size=2, normalize_targets=True)
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_nothing_removed_gives_zero():
    images, prediction, mask = random_inputs()
    assert mae_loss(images, prediction, mask * 0, patch_size=2, normalize_targets=True).item() == 0


def test_a_boolean_mask_does():
    images, prediction, mask = random_inputs()
    torch.testing.assert_close(
        mae_loss(images, prediction, mask.bool(), patch_size=2, normalize_targets=True),
        mae_loss(images, prediction, mask, patch_size=2, normalize_targets=True),
    )


def test_a_prediction_of_another_shape_is_refused():
    images, prediction, mask = random_inputs()
    with pytest.raises(ValueError, match=r"prediction \(2, 6, 12\) and mask \(2, 6\)"):
        mae_loss(images, prediction[:, :5], mask, patch_size=2, normalize_targets=True)


@pytest.mark.parametrize("normalize_targets", [False, True])
def test_the_loss_of_removed_patches_alone_is_the_same(normalize_targets):
    images, prediction, _ = random_inputs()
    _, removed, _ = split_by_mask(torch.rand(2, 6).argsort(dim=1) < 3, num_kept=3)
    mask = torch.zeros(2, 6).scatter(1, removed, 1.0)
    expected = mae_loss(images, prediction, mask, patch_size=2, normalize_targets=normalize_targets)
    patches = take_patches(patchify(images, 2), removed)
    loss = removed_patches_loss(patches, take_patches(prediction, removed), normalize_targets=normalize_targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, prediction), torch.autograd.grad(expected, prediction))


def test_predictions_of_other_patches_are_refused():
    with pytest.raises(ValueError, match=r"prediction \(2, 3, 12\) for these patches. Got \(2, 4, 12\)"):
        removed_patches_loss(torch.ones(2, 3, 12), torch.ones(2, 4, 12), normalize_targets=True)
