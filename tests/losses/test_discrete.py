"""Losses over codes against loops written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from ssl_pipeline.losses import gumbel_softmax, logit_laplace_loss, masked_token_loss, uniform_kl_loss


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_logit_laplace_loss_and_its_gradient_equal_the_loop():
    images, prediction = random(2, 3, 2, 2).sigmoid(), random(2, 6, 2, 2, seed=1).requires_grad_()
    terms = []
    for n in range(2):
        for c in range(3):
            for place in range(4):
                x = images[n, c].flatten()[place]
                mu, b = prediction[n, c].flatten()[place], prediction[n, 3 + c].flatten()[place].exp()
                terms.append(torch.log(2 * b * x * (1 - x)) + abs(torch.log(x / (1 - x)) - mu) / b)
    expected = torch.stack(terms).mean()
    loss = logit_laplace_loss(images, prediction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, prediction), torch.autograd.grad(expected, prediction))


def test_logit_laplace_is_a_likelihood():
    # over all pixels between 0 and 1 the density exp(-loss) has the integral 1
    pixels = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    density = [
        (-logit_laplace_loss(x.reshape(1, 1, 1, 1), torch.tensor([0.3, -0.2]).double().reshape(1, 2, 1, 1))).exp()
        for x in pixels[::40]
    ]
    assert torch.stack(density).mean().item() == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("pixel", [0.0, 1.0, -0.1, 1.2])
def test_pixels_without_a_logit_have_a_finite_loss(pixel):
    prediction = torch.zeros(1, 2, 1, 1, requires_grad=True)
    loss = logit_laplace_loss(torch.full((1, 1, 1, 1), pixel), prediction)
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad.isfinite().all()


def test_logit_laplace_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"prediction \(N, 2 C, H, W\)\. Got \(1, 3, 2, 2\) and \(1, 3, 2, 2\)"):
        logit_laplace_loss(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2))


def test_uniform_kl_equals_the_loop_and_does_not_grow_with_cells():
    logits = random(2, 5, 3, 3).requires_grad_()
    cells = []
    for cell in logits.permute(0, 2, 3, 1).reshape(-1, 5):
        q = cell.exp() / cell.exp().sum()
        cells.append(sum(q[k] * (torch.log(q[k]) + math.log(5)) for k in range(5)))
    expected, loss = torch.stack(cells).mean(), uniform_kl_loss(logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    torch.testing.assert_close(uniform_kl_loss(torch.cat([logits, logits], dim=2)), loss)


def test_uniform_kl_has_its_ends():
    assert uniform_kl_loss(torch.zeros(2, 7, 1, 1)).item() == pytest.approx(0, abs=1e-6)
    sure = torch.zeros(1, 7, 1, 1)
    sure[:, 2] = 100.0
    assert uniform_kl_loss(sure).item() == pytest.approx(math.log(7))


def test_a_cold_mixture_is_the_code_with_the_largest_sum():
    logits, noise = random(2, 4, 1, 2), random(2, 4, 1, 2, seed=1)
    mixture = gumbel_softmax(logits, noise, temperature=1e-3)
    assert torch.equal(mixture.argmax(dim=1), (logits + noise).argmax(dim=1))
    torch.testing.assert_close(mixture.sum(dim=1), torch.ones(2, 1, 2, dtype=torch.float64))
    warm = torch.exp((logits + noise) / 0.5)
    torch.testing.assert_close(gumbel_softmax(logits, noise, temperature=0.5), warm / warm.sum(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="temperature above 0"):
        gumbel_softmax(logits, noise, temperature=0.0)


def test_masked_token_loss_and_its_gradient_equal_the_loop():
    logits, tokens = random(4, 3).requires_grad_(), torch.tensor([0, 2, 1, 1])
    terms = [-torch.log(row.exp()[token] / row.exp().sum()) for row, token in zip(logits, tokens, strict=True)]
    expected = torch.stack(terms).mean()
    loss, right = masked_token_loss(logits, tokens)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    assert right.item() == pytest.approx(
        sum(row.argmax() == t for row, t in zip(logits, tokens, strict=True)).item() / 4
    )


def test_nothing_masked_is_zero_and_differentiable():
    logits = torch.zeros(0, 3, requires_grad=True)
    loss, right = masked_token_loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert (loss.item(), right.item()) == (0, 0)


def test_masked_token_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"Got \(4, 3\) and \(3,\)"):
        masked_token_loss(torch.ones(4, 3), torch.zeros(3, dtype=torch.int64))
