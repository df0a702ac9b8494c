"""The losses of semi-supervised methods, and what makes targets, against loops over images and classes."""

import math

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.distributed import rank, world_size
from ssl_pipeline.losses import (
    align_distribution,
    consistency_loss,
    fixmatch_loss,
    guess_labels,
    interpolate_logits,
    pseudo_label_loss,
    relative_threshold,
    sharpen,
    weighted_cross_entropy,
)
from tests.ranks import run_on_ranks


def random_inputs():
    generator = torch.Generator().manual_seed(0)
    labelled, weak, strong = [
        (2 * torch.randn(count, 4, generator=generator, dtype=torch.float64)).requires_grad_() for count in (3, 7, 7)
    ]
    return labelled, torch.tensor([0, 3, 1]), weak, strong


def test_fixmatch_loss_and_its_gradient_equal_the_loop():
    labelled, labels, weak, strong = random_inputs()
    expected, kept_expected = 0.0, []
    for logits, label in zip(labelled, labels, strict=True):
        expected = expected - torch.log_softmax(logits, 0)[label] / len(labels)
    for weak_logits, strong_logits in zip(weak.detach(), strong, strict=True):
        confidence, guess = weak_logits.softmax(0).max(0)
        kept_expected.append(confidence.item() >= 0.7)
        if kept_expected[-1]:
            # the mean over all of them, not over the kept
            expected = expected - 2.5 * torch.log_softmax(strong_logits, 0)[guess] / len(weak)
    assert 0 < sum(kept_expected) < len(weak)
    loss, kept = fixmatch_loss(labelled, labels, weak, strong, threshold=0.7, unlabelled_weight=2.5)
    torch.testing.assert_close(loss, expected)
    assert kept.tolist() == kept_expected
    loss.backward()
    torch.testing.assert_close([labelled.grad, strong.grad], list(torch.autograd.grad(expected, (labelled, strong))))
    assert weak.grad is None


def test_no_kept_image_leaves_the_supervised_loss():
    uniform = torch.zeros(5, 4)
    labelled, labels = torch.zeros(2, 4), torch.tensor([0, 1])
    loss, kept = fixmatch_loss(labelled, labels, uniform, uniform, threshold=0.95, unlabelled_weight=1)
    torch.testing.assert_close(loss, torch.tensor(math.log(4)))
    assert not kept.any()


def test_a_confidence_equal_to_the_threshold_is_kept():
    weak = torch.zeros(1, 2)
    _, kept = fixmatch_loss(torch.zeros(1, 2), torch.tensor([0]), weak, weak, threshold=0.5, unlabelled_weight=1)
    assert kept.all()


def test_views_of_different_number_are_refused():
    labelled, labels, weak, strong = random_inputs()
    with pytest.raises(ValueError, match=r"Got \(7, 4\), \(6, 4\) and \(3, 4\)"):
        fixmatch_loss(labelled, labels, weak, strong[:6], threshold=0.9, unlabelled_weight=1)


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(target_C, logits_C):
    return -(target_C * torch.log_softmax(logits_C, dim=0)).sum()


# Pseudo-labels


@pytest.mark.parametrize(
    "threshold", [0.7, torch.tensor(0.7), torch.tensor([0.3, 0.9, 0.6, 0.8]), torch.zeros(4), torch.ones(4)]
)
def test_pseudo_labels_and_their_gradient_equal_the_loop(threshold):
    probabilities = random_logits(9, 4).softmax(dim=1).requires_grad_()
    strong = random_logits(9, 4, seed=1).requires_grad_()
    expected, kept_expected = 0 * strong.sum(), []
    for i in range(9):
        confidence, guess = probabilities[i].detach().max(dim=0)
        limit = threshold[guess] if isinstance(threshold, torch.Tensor) and threshold.ndim else threshold
        kept_expected.append(bool(confidence >= limit))
        if kept_expected[-1]:
            expected = expected - torch.log_softmax(strong[i], dim=0)[guess] / 9
    loss, kept = pseudo_label_loss(probabilities, strong, threshold=threshold)
    assert_close(loss, expected)
    assert kept.tolist() == kept_expected
    assert kept.dtype == torch.bool
    loss.backward()
    assert_close(strong.grad, torch.autograd.grad(expected, strong)[0])
    assert probabilities.grad is None


def test_fixmatch_is_the_labelled_cross_entropy_and_the_pseudo_labels():
    labelled, labels, weak, strong = random_inputs()
    loss, kept = fixmatch_loss(labelled, labels, weak, strong, threshold=0.7, unlabelled_weight=2.5)
    unlabelled, same = pseudo_label_loss(weak.softmax(dim=1), strong, threshold=0.7)
    assert torch.equal(kept, same)
    assert_close(loss, torch.nn.functional.cross_entropy(labelled, labels) + 2.5 * unlabelled)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.0, 0.5, 2.0]).double(), torch.tensor([True, False, True])])
def test_weighted_cross_entropy_is_a_mean_over_all_rows(soft, weights):
    logits, targets = random_logits(3, 4).requires_grad_(), torch.tensor([1, 3, 0])
    probabilities = random_logits(3, 4, seed=1).softmax(dim=1) if soft else torch.eye(4).double()[targets]
    each = [1.0] * 3 if weights is None else weights.tolist()
    expected = sum(each[i] * cross_entropy(probabilities[i], logits[i]) for i in range(3)) / 3
    given = probabilities.clone().requires_grad_() if soft else targets
    loss = weighted_cross_entropy(logits, given, weights)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(expected, logits))
    if soft:
        loss.backward()
        assert given.grad is None


# Consistency


def test_consistency_equals_the_loop_and_trains_the_student_alone():
    student, teacher = random_logits(5, 3).requires_grad_(), random_logits(5, 3, seed=1).requires_grad_()
    mse, kl = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i in range(5):
        p, q = student[i].softmax(dim=0), teacher[i].detach().softmax(dim=0)
        for c in range(3):
            mse = mse + (p[c] - q[c]) ** 2 / 15
            kl = kl + q[c] * (q[c].log() - p[c].log()) / 5
    for distance, expected in (("mse", mse), ("kl", kl)):
        loss = consistency_loss(student, teacher, distance=distance)
        assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
        assert_close(gradients[0], torch.autograd.grad(expected, student, retain_graph=True)[0])
        assert gradients[1] is None
        assert consistency_loss(student, student + 7, distance=distance).abs() < 1e-12  # a constant changes no softmax


# Targets


def test_sharpening_makes_powers_of_probabilities():
    assert_close(sharpen(torch.tensor([[0.5, 0.3, 0.2]]), temperature=0.5), torch.tensor([[0.25, 0.09, 0.04]]) / 0.38)
    even = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    assert_close(sharpen(even, temperature=1.0), even)
    hard = sharpen(torch.full((1, 1000), 0.001), temperature=0.01)
    assert_close(hard, torch.full((1, 1000), 0.001))  # 0.001^100 is 0 in float32


def test_guesses_are_the_sharpened_mean_of_probabilities_not_of_logits():
    logits = random_logits(3, 4, 5).requires_grad_()
    guesses = guess_labels(logits, temperature=0.5)
    for u in range(4):
        mean = sum(logits[v, u].softmax(dim=0) for v in range(3)) / 3
        powers = mean.detach() ** 2
        assert_close(guesses[u], powers / powers.sum())
    assert not guesses.requires_grad
    of_logits = sharpen(logits.detach().mean(dim=0).softmax(dim=1), temperature=0.5)
    assert (guesses - of_logits).abs().max() > 0.01


def test_aligned_rows_lean_towards_what_the_model_says_too_rarely():
    probabilities = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    aligned = align_distribution(probabilities, torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2]), eps=0.0)
    assert_close(aligned, torch.tensor([[0.2, 0.8], [0.9 / 1.3, 0.4 / 1.3]]))
    with_eps = align_distribution(probabilities, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert_close(with_eps, probabilities)  # 0 / 0 without eps


def test_logits_are_interpolated_entry_by_entry():
    joint, alone = random_logits(2, 3).requires_grad_(), random_logits(2, 3, seed=1).requires_grad_()
    draws = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.0, 1.0]])
    between = interpolate_logits(joint, alone, draws)
    assert_close(between[0], torch.stack([joint[0, 0], (joint[0, 1] + alone[0, 1]) / 2, alone[0, 2]]))
    between.sum().backward()
    assert_close(joint.grad, (1 - draws).double())
    assert_close(alone.grad, draws.double())


def threshold_of_a_share():
    probabilities = random_logits(6, 3).softmax(dim=1)
    mine = probabilities.chunk(world_size())[rank()]
    return relative_threshold(mine, share=0.9), 0.9 * mine.amax(dim=1).mean()


def test_the_relative_threshold_is_that_of_the_labelled_rows_of_all_processes():
    expected, _ = threshold_of_a_share()
    rows = random_logits(6, 3).softmax(dim=1)
    assert_close(expected, 0.9 * sum(row.max() for row in rows) / 6)
    (first, own), (second, _) = run_on_ranks(threshold_of_a_share)
    assert torch.equal(first, second)
    assert_close(first, expected)
    assert abs(own - expected) > 0.005, "the control has to be noticed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = random_logits(3, 4).to(dtype)
    probabilities = logits.float().softmax(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = [
            pseudo_label_loss(probabilities, logits, threshold=0.5)[0],
            consistency_loss(logits, logits),
            guess_labels(logits[None], temperature=0.5),
            sharpen(probabilities.to(dtype), temperature=0.5),
            interpolate_logits(logits, logits, torch.zeros(3, 4)),
        ]
    assert {tensor.dtype for tensor in found} == {torch.float32}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: pseudo_label_loss(torch.ones(2, 3), torch.ones(3, 3), threshold=0.5), r"Got \(2, 3\), \(3, 3\)"),
        (lambda: pseudo_label_loss(torch.ones(0, 3), torch.ones(0, 3), threshold=0.5), "N >= 1"),
        (lambda: weighted_cross_entropy(torch.ones(2, 3), torch.zeros(3)), r"Got \(2, 3\), \(3,\) and no weights"),
        (lambda: weighted_cross_entropy(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)), r"weights \(3,\)"),
        (lambda: consistency_loss(torch.ones(2, 3), torch.ones(2, 4)), r"Got \(2, 3\), \(2, 4\)"),
        (lambda: sharpen(torch.ones(1, 2), temperature=0.0), "temperature above 0"),
        (lambda: guess_labels(torch.ones(2, 3), temperature=0.5), r"\(V, U, C\), V >= 1. Got \(2, 3\)"),
        (lambda: align_distribution(torch.ones(2, 3), torch.ones(3), torch.ones(2)), r"\(3,\) and \(2,\)"),
        (lambda: relative_threshold(torch.ones(0, 3), share=0.9), r"B >= 1. Got \(0, 3\)"),
        (lambda: interpolate_logits(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), r"Got .*\(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
