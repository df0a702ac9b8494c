"""Barlow Twins' and VICReg's losses against loops written from the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssl_pipeline.losses import barlow_twins_loss, vicreg_loss


def random_pair(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True) for _ in range(2)]


def barlow_twins_by_loops(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    num_rows, dim = z1.shape
    total = torch.zeros((), dtype=z1.dtype)
    for i in range(dim):
        for j in range(dim):
            a, b = z1[:, i] - sum(z1[:, i]) / num_rows, z2[:, j] - sum(z2[:, j]) / num_rows
            deviations = [(sum(column**2) / num_rows + 1e-5) ** 0.5 for column in (a, b)]
            c = sum(a * b) / num_rows / (deviations[0] * deviations[1])
            total = total + ((c - 1) ** 2 if i == j else weight * c**2)
    return total


@pytest.mark.parametrize("shape", [(2, 3), (6, 4), (5, 1)])
def test_barlow_twins_and_its_gradient_equal_the_loop(shape):
    z1, z2 = random_pair(*shape)
    expected = barlow_twins_by_loops(z1, z2, 0.3)
    actual = barlow_twins_loss(z1, z2, off_diagonal_weight=0.3)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (z1, z2)), torch.autograd.grad(expected, (z1, z2)))


def test_barlow_twins_by_hand():
    # two dimensions that are uncorrelated, the same in both views, and of length 10, so that 1e-5 does not count
    z = 10 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert barlow_twins_loss(z, z, off_diagonal_weight=0.5).item() == pytest.approx(0, abs=1e-12)
    # the other view has the dimensions exchanged: c = [[0, 1], [1, 0]]
    assert barlow_twins_loss(z, z.flip(1), off_diagonal_weight=0.5).item() == pytest.approx(2 + 0.5 * 2, abs=1e-5)
    # all embeddings the same: c = 0, and the gradient is finite
    same = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    loss = barlow_twins_loss(same, same, off_diagonal_weight=0.5)
    loss.backward()
    assert loss.item() == 2
    assert same.grad.isfinite().all()


WEIGHTS = {"invariance_weight": 2.0, "variance_weight": 3.0, "covariance_weight": 0.5}


def vicreg_by_loops(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    num_rows, dim = z1.shape
    invariance = sum((z1[n, d] - z2[n, d]) ** 2 for n in range(num_rows) for d in range(dim)) / (num_rows * dim)
    variance, covariance = torch.zeros((), dtype=z1.dtype), torch.zeros((), dtype=z1.dtype)
    for z in (z1, z2):
        means = [sum(z[:, d]) / num_rows for d in range(dim)]
        for i in range(dim):
            for j in range(dim):
                entry = sum((z[:, i] - means[i]) * (z[:, j] - means[j])) / (num_rows - 1)
                if i != j:
                    covariance = covariance + entry**2 / dim
                elif entry + 1e-4 < 1:
                    variance = variance + (1 - (entry + 1e-4) ** 0.5) / dim / 2
    return {"invariance": invariance, "variance": variance, "covariance": covariance}


@pytest.mark.parametrize("shape", [(2, 3), (6, 4), (5, 1)])
def test_vicreg_its_terms_and_its_gradient_equal_the_loop(shape):
    z1, z2 = random_pair(*shape)
    terms = vicreg_by_loops(z1, z2)
    expected = 2 * terms["invariance"] + 3 * terms["variance"] + 0.5 * terms["covariance"]
    actual, found = vicreg_loss(z1, z2, **WEIGHTS)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(found, {name: term.detach() for name, term in terms.items()})
    assert not any(term.requires_grad for term in found.values())
    torch.testing.assert_close(torch.autograd.grad(actual, (z1, z2)), torch.autograd.grad(expected, (z1, z2)))


def test_vicreg_by_hand():
    z1 = torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=torch.float64)  # variances 1/2 and 0, covariance 0
    z2 = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)  # variances 2, covariance 2
    _, terms = vicreg_loss(z1, z2, **WEIGHTS)
    assert terms["invariance"].item() == pytest.approx((0.25 + 1 + 0.25 + 1) / 4)
    assert terms["variance"].item() == pytest.approx((1 - 0.5001**0.5 + 1 - 0.01) / 2 / 2)
    assert terms["covariance"].item() == pytest.approx(2 * 2**2 / 2)
    same = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)  # all embeddings the same
    vicreg_loss(same, same, **WEIGHTS)[0].backward()
    assert same.grad.isfinite().all()


def barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    return barlow_twins_loss(z1, z2, off_diagonal_weight=0.1)


def vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    return vicreg_loss(z1, z2, **WEIGHTS)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [barlow_twins, vicreg])
def test_half_precision_is_computed_in_float32(loss, dtype):
    z1, z2 = (z.detach().to(dtype) for z in random_pair(6, 4))
    exact = loss(z1.double(), z2.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(z1, z2)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [barlow_twins, vicreg])
def test_what_does_not_fit_is_refused(loss):
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match=rf"^{loss.__name__}_loss needs z1, z2 of one shape \(N, D\)\. Got"):
        loss(z, z[:3])
    with pytest.raises(ValueError, match=rf"^{loss.__name__}_loss needs z1, z2 of one shape \(N, D\)\. Got"):
        loss(z[0], z[0])
    with pytest.raises(ValueError, match=r"needs at least 2 rows over all processes\. Got 1"):
        loss(z[:1], z[:1])
