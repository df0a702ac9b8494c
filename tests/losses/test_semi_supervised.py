"""FixMatch's loss against a loop over the images."""

import math

import pytest
import torch

from ssl_pipeline.losses import fixmatch_loss


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
