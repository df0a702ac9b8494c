"""The loss of masked patches against a loop, and in slabs of prototypes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.distributed import mean_over_ranks, rank, world_size
from ssl_pipeline.losses import (
    masked_patch_loss,
    masked_patch_weights,
    prototype_cross_entropy,
    prototypes,
    sinkhorn_knopp,
    sinkhorn_targets,
)
from tests.methods.test_no_sync import cpu_refuses_to_wait
from tests.ranks import run_on_ranks

MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
M = int(MASK.sum())


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits_and_targets(num_rows=M):
    return random(num_rows, 5, seed=0).requires_grad_(), random(num_rows, 5, seed=1).softmax(dim=1)


def by_loops(student, teacher, mask, temperature):
    row, total = 0, 0 * student.sum()
    for patches in mask.tolist():
        of_image = []
        for masked in patches:
            if masked:
                of_image.append(-(teacher[row] * torch.log_softmax(student[row] / temperature, dim=0)).sum())
                row += 1
        if of_image:
            total = total + sum(of_image) / len(of_image)
    return total / len(mask)


@pytest.mark.parametrize("mask", [MASK, MASK[:1], MASK[[1, 2]], MASK[3:]])
def test_the_loss_and_its_gradient_equal_the_loop(mask):
    student, teacher = logits_and_targets(int(mask.sum()))
    actual = masked_patch_loss(student, teacher, mask, temperature=0.3)
    expected = by_loops(student, teacher, mask, 0.3)
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual, student), torch.autograd.grad(expected, student))


def test_by_hand():
    half = torch.full((3, 2), 0.5)
    mask = torch.tensor([[True, True], [True, False], [False, False], [False, False]])
    loss = masked_patch_loss(torch.zeros(3, 2), half, mask, temperature=0.1)
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item() * 2 / 4)
    assert masked_patch_weights(mask, 3).tolist() == [1 / 8, 1 / 8, 1 / 4]


def test_nothing_masked_is_zero_and_still_differentiable():
    student, teacher = logits_and_targets(0)
    loss = masked_patch_loss(student, teacher, torch.zeros(3, 4, dtype=torch.bool), temperature=0.1)
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 5)


def test_the_gradient_passes_gradcheck_and_leaves_the_teacher_alone():
    student, teacher = logits_and_targets()
    assert torch.autograd.gradcheck(lambda s: masked_patch_loss(s, teacher, MASK, temperature=0.7), student)
    teacher = teacher.clone().requires_grad_()
    masked_patch_loss(student, teacher, MASK, temperature=0.7).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("slab", [1, 3, 8192])
def test_slabs_of_prototypes_give_the_same(monkeypatch, slab):
    monkeypatch.setattr(prototypes, "SLAB", slab)
    rows, weights, teacher = (random(n, 4, seed=n) for n in (M, 7, M))
    rows.requires_grad_()
    weights.requires_grad_()
    targets = sinkhorn_targets(teacher, weights.detach(), epsilon=0.5, num_iterations=3)
    with cpu_refuses_to_wait():
        weights_M = masked_patch_weights(MASK, len(rows), dtype=torch.float64)
    actual, _ = prototype_cross_entropy(rows, weights, targets, weights_M, temperature=0.3)
    codes = sinkhorn_knopp(teacher @ weights.T, epsilon=0.5, num_iterations=3)
    expected = masked_patch_loss(rows @ weights.T, codes, MASK, temperature=0.3)
    assert_close(actual, expected)
    inputs = (rows, weights)
    assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))


def of_a_share(wrong):
    """The mean over processes of loss and gradient; images 0, 1 and 2, 3 have different numbers of masked patches."""
    student, teacher = logits_and_targets()
    here = MASK if world_size() == 1 else MASK[2 * rank() : 2 * rank() + 2]
    first = 0 if rank() == 0 else int(MASK[:2].sum())
    rows = slice(first, first + int(here.sum()))
    loss = masked_patch_loss(student[rows], teacher[rows], here, temperature=0.3)
    if wrong:  # the mean over the patches of this process
        loss = -(teacher[rows] * torch.log_softmax(student[rows] / 0.3, dim=1)).sum(dim=1).mean()
    loss.backward()
    return mean_over_ranks(loss), mean_over_ranks(student.grad)


def test_two_processes_with_different_numbers_of_patches_are_one():
    expected = of_a_share(False)
    first, second = run_on_ranks(of_a_share, False)
    assert_close(first, second, rtol=0, atol=0)
    assert_close(first, expected)
    wrong, _ = run_on_ranks(of_a_share, True)
    assert (wrong[0] - expected[0]).abs() > 1e-3, "the control has to be noticed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = (tensor.detach().to(dtype) for tensor in logits_and_targets())
    exact = masked_patch_loss(student.double(), teacher.double(), MASK, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_patch_loss(student, teacher, MASK, temperature=0.1)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"student_MK": torch.ones(3, 5)}, r"Got \(3, 5\) and \(8, 5\) for 8 of \(4, 4\)"),
        ({"teacher_MK": torch.ones(8, 4)}, r"Got \(8, 5\) and \(8, 4\)"),
        ({"mask_NL": MASK.float()}, r"torch\.float32"),
        ({"temperature": 0.0}, r"temperature above 0\. Got 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence):
    student, teacher = logits_and_targets()
    arguments = {"student_MK": student, "teacher_MK": teacher, "mask_NL": MASK, "temperature": 0.1} | change
    with pytest.raises(ValueError, match=sentence):
        masked_patch_loss(**arguments)
