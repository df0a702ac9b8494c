"""The losses of MAE and SimMIM against loops over patches and pixels."""

import pytest
import torch

from ssl_pipeline.backbones.patches import patchify, split_by_mask, take_patches
from ssl_pipeline.losses import mae_loss, removed_patches_loss, simmim_loss


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
    order = torch.rand(2, 6, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    _, removed, _ = split_by_mask(order < 3, num_kept=3)
    mask = torch.zeros(2, 6).scatter(1, removed, 1.0)
    expected = mae_loss(images, prediction, mask, patch_size=2, normalize_targets=normalize_targets)
    patches = take_patches(patchify(images, 2), removed)
    loss = removed_patches_loss(patches, take_patches(prediction, removed), normalize_targets=normalize_targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, prediction), torch.autograd.grad(expected, prediction))


def test_predictions_of_other_patches_are_refused():
    with pytest.raises(ValueError, match=r"prediction \(2, 3, 12\) for these patches. Got \(2, 4, 12\)"):
        removed_patches_loss(torch.ones(2, 3, 12), torch.ones(2, 4, 12), normalize_targets=True)


# SimMIM


def painted_images():
    images, _, mask = random_inputs()
    prediction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images, prediction.requires_grad_(), mask


def test_simmim_loss_and_its_gradient_equal_the_loop():
    images, prediction, mask = painted_images()
    total, num_pixels = 0.0, 0
    for n in range(2):
        for y in range(4):
            for x in range(6):
                if mask[n, y // 2 * 3 + x // 2] == 1:
                    num_pixels += 1
                    for c in range(3):
                        total = total + abs(images[n, c, y, x] - prediction[n, c, y, x])
    expected = total / (num_pixels + 1e-5) / 3
    loss = simmim_loss(images, prediction, mask, patch_size=2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, prediction), torch.autograd.grad(expected, prediction))


def test_simmim_loss_by_hand():
    images, prediction = torch.zeros(1, 1, 2, 4), torch.tensor([[[[1.0, 1, 9, 9], [2.0, -2, 9, 9]]]])
    loss = simmim_loss(images, prediction, torch.tensor([[True, False]]), patch_size=2)
    torch.testing.assert_close(loss, torch.tensor(6 / 4.00001))


def test_simmim_counts_the_pixels_of_the_whole_batch():
    images, prediction, mask = painted_images()  # four masked patches, then one
    single = [simmim_loss(images[[n]], prediction[[n]], mask[[n]], patch_size=2) for n in range(2)]
    loss = simmim_loss(images, prediction, mask, patch_size=2)
    torch.testing.assert_close(loss, (4 * single[0] + single[1]) / 5, rtol=1e-5, atol=0)


def test_simmim_with_nothing_masked_is_zero_and_differentiable():
    images, prediction, mask = painted_images()
    loss = simmim_loss(images, prediction, mask * 0, patch_size=2)
    loss.backward()
    assert loss.item() == 0
    assert not prediction.grad.any()


@pytest.mark.parametrize(("patch_size", "columns"), [(2, 5), (4, 6), (3, 6)])
def test_simmim_loss_refuses_masks_that_do_not_fit(patch_size, columns):
    images, prediction, mask = painted_images()
    with pytest.raises(ValueError, match=rf"simmim_loss needs sides divisible by {patch_size} and a mask"):
        simmim_loss(images, prediction, mask[:, :columns], patch_size=patch_size)


def test_simmim_loss_refuses_another_shape():
    images, prediction, mask = painted_images()
    with pytest.raises(ValueError, match=r"of one shape .* Got \(2, 3, 4, 6\) and \(2, 3, 4, 4\)"):
        simmim_loss(images, prediction[..., :4], mask, patch_size=2)
