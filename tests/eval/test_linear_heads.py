import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ssl_pipeline.eval.linear_heads import logistic_regression, stratified_split, train_linear_heads


def separable(num_images: int = 90, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes around three corners of a square."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % 3
    corners = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, -2.0]])
    return corners[labels] + 0.2 * torch.randn(num_images, 2, generator=generator), labels


def heads(rates: list[float], decays: list[float], *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    features, labels = separable()
    return train_linear_heads(
        features.to(dtype),
        labels,
        learning_rates=rates,
        weight_decays=decays,
        num_classes=3,
        epochs=6,
        batch_size=32,
        seed=0,
    )


def test_a_separable_problem_is_learnt() -> None:
    weights, biases = heads([1.0], [0.0])
    features, labels = separable(seed=1)
    assert torch.equal((features @ weights[0] + biases[0]).argmax(dim=1), labels)


def test_stacked_heads_are_each_head_alone() -> None:
    settings = [(0.01 * 1.6**number, decay) for number in range(16) for decay in (0.0, 1e-2)]
    weights, biases = heads(*map(list, zip(*settings, strict=True)), dtype=torch.float64)
    for number, (rate, decay) in enumerate(settings):
        weight, bias = heads([rate], [decay], dtype=torch.float64)
        torch.testing.assert_close(weights[number], weight[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(biases[number], bias[0], rtol=1e-12, atol=1e-12)


def test_heads_in_several_products_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [0.1, 1.0, 3.0, 5.0, 8.0]
    whole = heads(rates, [0.0, 0.1] * 2 + [0.0], dtype=torch.float64)
    monkeypatch.setattr("ssl_pipeline.eval.linear_heads.LARGEST_LOGITS", 2 * 32 * 3)  # two heads at a time
    parts = heads(rates, [0.0, 0.1] * 2 + [0.0], dtype=torch.float64)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_heads_are_those_of_autograd_and_torchs_sgd() -> None:
    features, labels = (x.double() if x.is_floating_point() else x for x in separable())
    weight = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    total, step = 6 * 3, 0
    for _ in range(6):
        for rows in torch.randperm(90, generator=generator).split(32):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * 32 / 256 * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            cross_entropy(features[rows] @ weight + bias, labels[rows]).backward()
            optimizer.step()
            step += 1
    stacked_weight, stacked_bias = heads([0.5], [0.01], dtype=torch.float64)
    torch.testing.assert_close(stacked_weight[0], weight.detach())
    torch.testing.assert_close(stacked_bias[0], bias.detach())


def test_a_head_that_diverges_leaves_the_others_alone() -> None:
    weights, _ = heads([0.5, 1e30], [0.0, 1e9])
    assert not weights[1].isfinite().all()
    torch.testing.assert_close(weights[0], heads([0.5], [0.0])[0][0])


def test_a_sweep_leaves_torchs_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "ssl_pipeline.eval.linear_heads.threshold", lambda p, *_: seen.append(torch.get_num_threads()) or p
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        heads([1.0], [0.0])
        monkeypatch.setattr("ssl_pipeline.eval.linear_heads.SMALL_PRODUCT", 0)
        heads([1.0], [0.0])
        assert torch.get_num_threads() == 2
        assert set(seen[: len(seen) // 2]) == {1}
        assert set(seen[len(seen) // 2 :]) == {2}
    finally:
        torch.set_num_threads(before)


def test_logistic_regression_learns_and_gives_log_probabilities() -> None:
    features, labels = separable()
    others, other_labels = separable(seed=1)
    scores = logistic_regression(features, labels, others, inverse_penalty=1.0, num_classes=3)
    assert torch.equal(scores.argmax(dim=1), other_labels)
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(90))


def test_logistic_regression_does_not_see_the_scale_of_features() -> None:
    features, labels = separable()
    scale = torch.tensor([1000.0, 0.001])
    first, second = (
        logistic_regression(x, labels, x, inverse_penalty=1.0, num_classes=3) for x in (features, features * scale)
    )
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_a_class_without_training_image_is_never_predicted() -> None:
    features, labels = separable()
    scores = logistic_regression(features, labels + 1, features, inverse_penalty=1.0, num_classes=5)
    assert (scores[:, [0, 4]] == -torch.inf).all()
    assert torch.equal(scores.argmax(dim=1), labels + 1)


def test_the_split_takes_its_share_of_every_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 4 + [3])
    kept, held_out = stratified_split(labels, fraction=0.1, seed=0)
    assert labels[held_out].bincount(minlength=4).tolist() == [5, 2, 1, 0]
    assert torch.equal(torch.cat((kept, held_out)).sort().values, torch.arange(75))


def test_the_split_depends_on_the_seed_alone() -> None:
    labels = torch.arange(60) % 3
    first, again, other = (stratified_split(labels, fraction=0.2, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_single_images_are_kept() -> None:
    kept, held_out = stratified_split(torch.arange(3), fraction=0.1, seed=0)
    assert kept.tolist() == [0, 1, 2]
    assert len(held_out) == 0
