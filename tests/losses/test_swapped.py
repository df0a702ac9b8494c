"""SwAV's loss against a loop over pairs of crops, with the official form of Sinkhorn-Knopp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssl_pipeline.losses import swav_loss


def random_scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def codes_by_loops(scores_NK: Tensor, epsilon: float, num_iterations: int) -> Tensor:
    codes = torch.exp(scores_NK / epsilon)
    num_rows, num_prototypes = codes.shape
    codes = codes / codes.sum()
    for _ in range(num_iterations):
        for k in range(num_prototypes):
            codes[:, k] /= codes[:, k].sum() * num_prototypes
        for n in range(num_rows):
            codes[n] /= codes[n].sum() * num_rows
    return codes * num_rows


def swav_by_loops(scores: Tensor, queue: Tensor | None, num_assigned: int) -> Tensor:
    num_crops, num_images, _ = scores.shape
    losses = []
    for a in range(num_assigned):
        rows = scores[a].detach() if queue is None else torch.cat([queue[a], scores[a].detach()])
        codes = codes_by_loops(rows, 0.3, 3)[len(rows) - num_images :]
        for v in range(num_crops):
            for b in range(num_images):
                if v != a:
                    losses.append(-(codes[b] * torch.log_softmax(scores[v, b] / 0.2, dim=0)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("num_crops", "num_assigned"), [(2, 2), (5, 2), (3, 1)])
@pytest.mark.parametrize("queue_size", [0, 7])
def test_the_loss_and_its_gradient_equal_the_loop(num_crops, num_assigned, queue_size):
    scores = random_scores(num_crops, 3, 4).requires_grad_()
    queue = random_scores(num_assigned, queue_size, 4, seed=1).requires_grad_() if queue_size else None
    expected = swav_by_loops(scores, None if queue is None else queue.detach(), num_assigned)
    actual = swav_loss(scores, queue, temperature=0.2, epsilon=0.3, num_iterations=3, num_assigned=num_assigned)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, scores), torch.autograd.grad(expected, scores))
    actual = swav_loss(scores, queue, temperature=0.2, epsilon=0.3, num_iterations=3, num_assigned=num_assigned)
    actual.backward()
    assert queue is None or queue.grad is None


@pytest.mark.parametrize(
    ("shape", "queue"), [((2, 3), None), ((1, 3, 4), None), ((2, 3, 4), (1, 5, 4)), ((2, 3, 4), (2, 5, 3))]
)
def test_what_does_not_fit_is_refused(shape, queue):
    with pytest.raises(ValueError, match=r"^swav_loss needs scores \(V, B, K\) of V >= num_assigned=2 crops"):
        swav_loss(
            torch.ones(shape),
            None if queue is None else torch.ones(queue),
            temperature=0.1,
            epsilon=0.05,
            num_iterations=3,
        )
