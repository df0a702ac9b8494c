"""VICReg against its pseudocode, written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, load
from ssl_pipeline.methods.vicreg import VICReg, VICRegConfig
from ssl_pipeline.schedule import Progress
from tests.methods.toys import assert_same_tensors, copies, descend, toy_batches, toy_method, train


def vicreg(**changes):
    settings = {"projector_hidden_dim": 7, "projector_dim": 5}
    return toy_method(VICReg, VICRegConfig(name="vicreg", **(settings | changes)))


def terms_of(z1, z2):
    num_rows, dim = z1.shape
    variance, covariance = 0.0, 0.0
    for z in (z1, z2):
        matrix = torch.cov(z.T)
        variance += sum((1 - (matrix[j, j] + 1e-4).sqrt()).clamp(min=0) for j in range(dim)) / dim / 2
        covariance += sum(matrix[i, j] ** 2 for i in range(dim) for j in range(dim) if i != j) / dim
    return {"invariance": ((z1 - z2) ** 2).sum() / num_rows / dim, "variance": variance, "covariance": covariance}


def test_steps_follow_the_pseudocode():
    method = vicreg()
    network, losses = copies(*method.encoder.children()), []
    for batch in toy_batches(4):
        terms = terms_of(*(network(view) for view in batch.views["view"]))
        loss = 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]
        network.zero_grad()
        loss.backward()
        descend(network, lr=0.05)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, toy_batches(4), lr=0.05), torch.stack(losses))
    assert_same_tensors(nn.Sequential(*method.encoder.children()), network)


def test_the_three_terms_are_logged():
    method = vicreg(invariance_weight=2.0, variance_weight=3.0, covariance_weight=5.0)
    network = copies(*method.encoder.children())
    (batch,) = toy_batches(1)
    output = method(batch, Progress(0, 1, 1))
    expected = terms_of(*(network(view).detach() for view in batch.views["view"]))
    assert {name: output.metrics[name].item() for name in expected} == pytest.approx(
        {name: term.item() for name, term in expected.items()}
    )
    weighted = 2 * expected["invariance"] + 3 * expected["variance"] + 5 * expected["covariance"]
    torch.testing.assert_close(output.loss.detach(), weighted)


def test_the_defaults_are_the_official_ones():
    config = VICRegConfig(name="vicreg")
    assert (config.invariance_weight, config.variance_weight, config.covariance_weight) == (25, 25, 1)
    assert (config.projector_hidden_dim, config.projector_dim, config.projector_layers) == (8192, 8192, 3)


def test_the_projector_has_the_official_layers():
    head = vicreg().encoder.head
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in head] == [*hidden, *hidden, nn.Linear]
    assert [layer.bias is not None for layer in head if isinstance(layer, nn.Linear)] == [True, True, False]


def test_a_collapse_shows():
    method = vicreg()
    (batch,) = toy_batches(1)
    spread = method(batch, Progress(0, 1, 1)).metrics
    batch.views["view"][:] = batch.views["view"][:, :1]  # all images the same
    collapsed = method(batch, Progress(0, 1, 1)).metrics
    assert spread["feature_std"] > 0.3
    assert collapsed["feature_std"] < 1e-6
    assert collapsed["variance"].item() == pytest.approx(0.99)  # 1 - sqrt(1e-4)


def test_the_recipe_has_the_official_numbers():
    config = load(PretrainConfig, ["recipe=vicreg_resnet50"], recipes=RECIPES)
    lr = config.optim.effective_lr(32 * config.data.batch_size)
    assert (32 * config.data.batch_size, config.train.epochs, config.optim.name) == (2048, 1000, "lars")
    assert (lr.value, lr.final, lr.warmup) == (pytest.approx(1.6), pytest.approx(0.0016), "10ep")
    assert config.optim.weight_decay.value == pytest.approx(1e-6)
