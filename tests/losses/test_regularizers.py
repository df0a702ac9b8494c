"""KoLeo and Gram anchoring against loops written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.losses import gram_anchoring_loss, koleo_loss
from tests.methods.test_no_sync import cpu_refuses_to_wait


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def koleo_by_loops(features, num_neighbours):
    unit = [row / row.norm() for row in features]
    terms = []
    for i, row in enumerate(unit):
        others = sorted((j for j in range(len(unit)) if j != i), key=lambda j: -(row @ unit[j]).item())
        terms += [-((row - unit[j]).norm() + 1e-8).log() for j in others[:num_neighbours]]
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("num_rows", "num_neighbours"), [(2, 1), (7, 1), (7, 3), (4, 3)])
def test_koleo_and_its_gradient_equal_the_loop(num_rows, num_neighbours):
    features = (3 * random(num_rows, 4)).requires_grad_()
    with cpu_refuses_to_wait():
        actual = koleo_loss(features, num_neighbours=num_neighbours)
    expected = koleo_by_loops(features, num_neighbours)
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual, features), torch.autograd.grad(expected, features))


def test_koleo_by_hand():
    corners = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])  # neighbours are sqrt(2) apart, whatever the length
    assert koleo_loss(corners).item() == pytest.approx(-math.log(2) / 2)
    assert koleo_loss(corners, num_neighbours=2).item() == pytest.approx(-(4 * math.log(2) / 2 + 2 * math.log(2)) / 6)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert koleo_loss(opposite).item() == pytest.approx(-math.log(2))


def test_koleo_of_equal_rows_is_large_and_finite():
    same = torch.ones(3, 4, requires_grad=True)
    loss = koleo_loss(same)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8))
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("negatives", ["kept", "removed", "teacher_removed"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 4), (6, 4)])
def test_gram_anchoring_and_its_gradient_equal_the_loop(shape, normalize, negatives):
    student, teacher = random(*shape).requires_grad_(), random(*shape[:-1], 3, seed=1)
    actual = gram_anchoring_loss(student, teacher, normalize=normalize, negatives=negatives)
    entries = []
    for own, theirs in zip(student.view(-1, *shape[-2:]), teacher.view(-1, shape[-2], 3), strict=True):
        if normalize:
            own, theirs = (torch.stack([row / row.norm() for row in rows]) for rows in (own, theirs))
        for i in range(len(own)):
            for j in range(len(own)):
                a, b = own[i] @ own[j], theirs[i] @ theirs[j]
                if negatives != "kept" and b < 0:
                    b = torch.zeros_like(b)
                if negatives == "removed" and a < 0:
                    a = torch.zeros_like(a)
                entries.append((a - b) ** 2)
    expected = torch.stack(entries).mean()
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual, student), torch.autograd.grad(expected, student))


def test_gram_anchoring_by_hand():
    aligned = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # the Gram matrix of unit rows is the identity
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert gram_anchoring_loss(aligned, opposite).item() == pytest.approx(0.5)  # two entries of 4 are off by 1
    assert gram_anchoring_loss(aligned, opposite, negatives="teacher_removed").item() == 0
    assert gram_anchoring_loss(opposite, aligned, negatives="teacher_removed").item() == pytest.approx(0.5)
    assert gram_anchoring_loss(opposite, aligned, negatives="removed").item() == 0
    turned = aligned @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert gram_anchoring_loss(turned, aligned).item() == pytest.approx(0, abs=1e-12)


def test_the_gram_teacher_receives_no_gradient():
    student, teacher = (random(4, 3, seed=seed).requires_grad_() for seed in (0, 1))
    gram_anchoring_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    rows, others = random(6, 4).to(dtype), random(6, 4, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = [koleo_loss(rows), gram_anchoring_loss(rows, others)]
    exact = [koleo_loss(rows.double()), gram_anchoring_loss(rows.double(), others.double())]
    assert [loss.dtype for loss in found] == [torch.float32] * 2
    assert [loss.item() for loss in found] == pytest.approx([loss.item() for loss in exact], rel=1e-5)


def test_gradients_pass_gradcheck():
    assert torch.autograd.gradcheck(lambda x: koleo_loss(x, num_neighbours=2), random(5, 3).requires_grad_())
    assert torch.autograd.gradcheck(lambda x: gram_anchoring_loss(x, random(4, 3)), random(4, 3).requires_grad_())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"^koleo_loss needs more rows than num_neighbours=3\. Got 3; try a larger"):
        koleo_loss(torch.ones(3, 2), num_neighbours=3)
    with pytest.raises(ValueError, match=r"^koleo_loss needs features \(N, D\) .* Got \(3,\) and 1\."):
        koleo_loss(torch.ones(3))
    with pytest.raises(ValueError, match=r"^gram_anchoring_loss needs student .* Got \(2, 4, 3\) and \(2, 5, 3\)\."):
        gram_anchoring_loss(torch.ones(2, 4, 3), torch.ones(2, 5, 3))
    with pytest.raises(ValueError, match=r"negatives of kept, removed, teacher_removed\. Got 'none'"):
        gram_anchoring_loss(torch.ones(2, 3), torch.ones(2, 3), negatives="none")
