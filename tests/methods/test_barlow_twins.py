"""Barlow Twins against its pseudocode, written out, and the learning rate of its biases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, load
from ssl_pipeline.methods.barlow_twins import BarlowTwins, BarlowTwinsConfig
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer, write_values
from ssl_pipeline.schedule import Progress, Schedule
from tests.methods.toys import assert_same_tensors, copies, descend, toy_batches, toy_method, train


def barlow_twins(**changes):
    settings = {"projector_hidden_dim": 7, "projector_dim": 5}
    return toy_method(BarlowTwins, BarlowTwinsConfig(name="barlow_twins", **(settings | changes)))


def test_steps_follow_the_pseudocode():
    method = barlow_twins(off_diagonal_weight=0.2)
    network, norm, losses = copies(*method.encoder.children()), nn.BatchNorm1d(5, affine=False).double(), []
    for batch in toy_batches(4):
        z1, z2 = (network(view) for view in batch.views["view"])
        c = norm(z1).T @ norm(z2) / 4
        on_diagonal = sum((c[i, i] - 1) ** 2 for i in range(5))
        off_diagonal = sum(c[i, j] ** 2 for i in range(5) for j in range(5) if i != j)
        loss = on_diagonal + 0.2 * off_diagonal
        network.zero_grad()
        loss.backward()
        descend(network, lr=0.05)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, toy_batches(4), lr=0.05), torch.stack(losses))
    assert_same_tensors(nn.Sequential(*method.encoder.children()), network)


def test_the_defaults_are_the_official_ones():
    config = BarlowTwinsConfig(name="barlow_twins")
    assert (config.projector_hidden_dim, config.projector_dim, config.projector_layers) == (8192, 8192, 3)
    assert (config.off_diagonal_weight, config.bias_lr_scale) == (0.0051, pytest.approx(0.0048 / 0.2))


def test_the_projector_has_the_official_layers():
    head = barlow_twins().encoder.head
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in head] == [*hidden, *hidden, nn.Linear]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_biases_and_norms_have_a_learning_rate_of_their_own(scale):
    method = barlow_twins(bias_lr_scale=scale)
    config = OptimConfig(name="lars", lr=Schedule(value=0.2))
    optimizer = build_optimizer(method, config)
    write_values(optimizer, config, config.lr, Progress(1, 8, 1))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in method.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.2 * (scale if parameter.ndim == 1 else 1)), name


def test_a_collapse_shows():
    method = barlow_twins()
    (batch,) = toy_batches(1)
    spread = method(batch, Progress(0, 1, 1)).metrics["feature_std"]
    batch.views["view"][:] = batch.views["view"][:, :1]  # all images the same
    assert spread > 0.3
    assert method(batch, Progress(0, 1, 1)).metrics["feature_std"] < 1e-6


def test_the_recipe_makes_the_steps_of_the_official_code_on_16_processes():
    config = load(PretrainConfig, ["recipe=barlow_twins_resnet50"], recipes=RECIPES)
    lr = config.optim.effective_lr(16 * config.data.batch_size)
    assert (16 * config.data.batch_size, config.train.epochs, config.optim.name) == (2048, 1000, "lars")
    assert (lr.value, lr.final, lr.warmup) == (pytest.approx(1.6), pytest.approx(0.0016), "10ep")
    assert lr.value * config.method.bias_lr_scale * 16 == pytest.approx(0.0048 * 8)
    assert config.optim.weight_decay.value / 16 == pytest.approx(1e-6)
