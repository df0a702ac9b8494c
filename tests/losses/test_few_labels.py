"""Losses of MixMatch, the Pi-model, Temporal Ensembling, UDA and FreeMatch against their formulas in loop form."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.losses import (
    annealed_cross_entropy,
    fairness_loss,
    labelled_cross_entropy,
    mixmatch_loss,
    pi_model_loss,
    probability_error,
    uda_loss,
)


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def assert_same_gradients(loss, expected, trained, untrained=()):
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, trained, retain_graph=True), torch.autograd.grad(expected, trained))
    assert all(
        gradient is None
        for gradient in torch.autograd.grad(loss, [*untrained, *trained], allow_unused=True)[: len(untrained)]
    )


def test_mixmatch_is_a_mean_over_rows_beside_one_over_rows_and_classes():
    labelled, unlabelled = logits(3, 4), logits(5, 4, seed=1)
    targets, guesses = logits(3, 4, seed=2).softmax(1), logits(5, 4, seed=3).softmax(1)
    first = sum(-targets[i, c].detach() * labelled[i].log_softmax(0)[c] for i in range(3) for c in range(4)) / 3
    second = sum((unlabelled[i].softmax(0)[c] - guesses[i, c].detach()) ** 2 for i in range(5) for c in range(4)) / 20
    loss, terms = mixmatch_loss(labelled, targets, unlabelled, guesses, unlabelled_weight=75.0)
    assert_close((terms["labelled"], terms["unlabelled"]), (first.detach(), second.detach()))
    assert not any(term.requires_grad for term in terms.values())
    assert_same_gradients(loss, first + 75 * second, (labelled, unlabelled))


def test_rows_that_weigh_nothing_still_count_in_the_mean():
    rows, targets, seen = (
        logits(4, 3),
        logits(4, 3, seed=1).softmax(1).detach(),
        torch.tensor([True, False, True, False]),
    )
    expected = sum((rows[i].softmax(0) - targets[i]).square().sum() for i in (0, 2)) / 12
    assert_close(probability_error(rows, targets, seen), expected)
    assert probability_error(rows, targets, torch.zeros(4, dtype=torch.bool)) == 0


def test_the_pi_model_divides_by_all_rows_and_trains_both_branches():
    first, second, labels = logits(5, 3), logits(5, 3, seed=1), torch.tensor([2, -1, 0, -1, -1])
    supervised = -(first[0].log_softmax(0)[2] + first[2].log_softmax(0)[0]) / 5
    distance = sum((first[i].softmax(0)[c] - second[i].softmax(0)[c]) ** 2 for i in range(5) for c in range(3)) / 15
    loss = pi_model_loss(first, second, labels, consistency_weight=8.0)
    assert_same_gradients(loss, supervised + 8 * distance, (first, second))


def test_without_a_label_only_consistency_is_left():
    first, none = logits(2, 3), torch.tensor([-1, -1])
    assert labelled_cross_entropy(first, none) == 0
    assert pi_model_loss(first, first + 5, none, consistency_weight=8.0).abs() < 1e-12


def test_uda_sharpens_the_target_but_not_the_mask():
    weak, strong = logits(6, 3), logits(6, 3, seed=1)
    expected, kept = torch.zeros((), dtype=torch.float64), []
    for i in range(6):
        kept.append(weak[i].softmax(0).max().item() > 0.6)
        target = (weak[i].detach() / 0.4).softmax(0)
        if kept[-1]:
            expected = expected + (target * (target.log() - strong[i].log_softmax(0))).sum() / 6
    loss, mask = uda_loss(weak, strong, threshold=0.6, temperature=0.4)
    assert mask.tolist() == kept
    assert 0 < sum(kept) < sum((weak / 0.4).softmax(1).amax(1) > 0.6)
    assert_same_gradients(loss, expected, (strong,), (weak,))


def test_the_mask_of_uda_wants_more_than_the_threshold():
    even = torch.zeros(1, 2)
    assert uda_loss(even, even, threshold=0.5, temperature=0.4)[1].tolist() == [False]


def test_annealing_drops_rows_whose_right_class_is_known_too_well():
    rows, labels = logits(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    right = [rows[i].softmax(0)[labels[i]] for i in range(6)]
    left = [i for i in range(6) if right[i] <= 0.35]
    assert 0 < len(left) < 6
    expected = sum(-right[i].log() for i in left) / len(left)
    assert_same_gradients(annealed_cross_entropy(rows, labels, limit=0.35), expected, (rows,))
    assert annealed_cross_entropy(rows, labels, limit=0.0) == 0
    assert torch.isfinite(annealed_cross_entropy(rows, labels, limit=0.0))


def test_fairness_equals_the_loop_and_trains_the_strong_views_alone():
    strong, kept = logits(8, 3), torch.tensor([True, True, False, True, True, False, True, True])
    p, h = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.6, 0.4, 0.0]).double()
    q = [sum(strong[i].softmax(0)[c] for i in range(8) if kept[i]) for c in range(3)]
    k = [sum(int(strong[i].argmax()) == c for i in range(8) if kept[i]) for c in range(3)]
    assert sum(count > 0 for count in k) >= 2
    a = [p[c] / h[c] if h[c] else 0 for c in range(3)]
    b = [q[c] / k[c] if k[c] else 0 for c in range(3)]
    expected = sum(a[c] / sum(a) * torch.log(torch.as_tensor(b[c] / sum(b)) + 1e-12) for c in range(3))
    assert_same_gradients(fairness_loss(strong, kept, p, h), expected, (strong,))


def test_fairness_of_nothing_kept_is_nothing():
    strong, even = logits(4, 3), torch.full((3,), 1 / 3)
    loss = fairness_loss(strong, torch.zeros(4, dtype=torch.bool), even, even)
    loss.backward()
    assert loss == 0
    assert not strong.grad.any()


def test_fairness_is_lowest_where_strong_views_prefer_what_weak_ones_do_not():
    """The sign: log b is large where a is, so the term is pushed down from there."""
    even = torch.full((2,), 0.5)
    balanced = torch.tensor([[2.0, -2.0], [-2.0, 2.0]]).requires_grad_()
    assert fairness_loss(balanced, torch.tensor([True, True]), even, even).item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: mixmatch_loss(*[torch.zeros(2, 3)] * 3, torch.zeros(3, 3), unlabelled_weight=1),
            "probability_error needs",
        ),
        (
            lambda: pi_model_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), consistency_weight=1),
            "of one shape",
        ),
        (
            lambda: labelled_cross_entropy(torch.zeros(2, 3), torch.zeros(3).long()),
            r"labels \(B,\), B >= 1\. Got \(2, 3\)",
        ),
        (lambda: uda_loss(torch.zeros(2, 3), torch.zeros(2, 3), threshold=0.5, temperature=0), "temperature above 0"),
        (lambda: annealed_cross_entropy(torch.zeros(2, 3), torch.zeros(3).long(), limit=1), r"needs logits \(B, C\)"),
        (
            lambda: fairness_loss(torch.zeros(2, 3), torch.zeros(2), torch.zeros(4), torch.zeros(3)),
            "fairness_loss needs",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
