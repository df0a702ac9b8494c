"""SimSiam against its pseudocode, written out, and its predictor's learning rate."""

import pytest
import torch
from torch import nn

from ssl_pipeline.methods.simsiam import SimSiam, SimSiamConfig
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer, write_values
from ssl_pipeline.schedule import Progress, Schedule
from tests.methods.toys import assert_same_tensors, copies, descend, toy_batches, toy_method, train


def simsiam(**changes):
    widths = {"projector_hidden_dim": 7, "projector_dim": 5, "predictor_hidden_dim": 4}
    return toy_method(SimSiam, SimSiamConfig(name="simsiam", **(widths | changes)))


def cosine(prediction, projection):
    return prediction @ projection / (prediction.norm() * projection.norm())


def test_steps_follow_the_pseudocode():
    method = simsiam()
    encoder, predictor = copies(method.encoder.backbone, method.encoder.head), copies(method.predictor)
    networks, losses = nn.ModuleList([encoder, predictor]), []
    for batch in toy_batches(3):
        first, second = batch.views["view"]
        z1, z2 = encoder(first), encoder(second)
        p1, p2 = predictor(z1), predictor(z2)
        z1, z2 = z1.detach(), z2.detach()
        loss = -sum(cosine(p1[i], z2[i]) / 2 + cosine(p2[i], z1[i]) / 2 for i in range(4)) / 4
        networks.zero_grad()
        loss.backward()
        descend(networks, lr=0.5)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, toy_batches(3), lr=0.5), torch.stack(losses))
    assert_same_tensors(nn.ModuleList([method.encoder, method.predictor]), networks)


def test_the_defaults_are_the_published_ones():
    config = SimSiamConfig(name="simsiam")
    assert (config.projector_hidden_dim, config.projector_dim, config.predictor_hidden_dim) == (2048, 2048, 512)
    assert (config.projector_layers, config.constant_predictor_lr) == (3, True)


def test_heads_have_the_official_layers():
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    projector, predictor = simsiam().encoder.head, simsiam().predictor
    assert [type(layer) for layer in projector] == [*hidden, *hidden, nn.Linear, nn.BatchNorm1d]
    assert [layer.affine for layer in projector if isinstance(layer, nn.BatchNorm1d)] == [True, True, False]
    assert [type(layer) for layer in predictor] == [*hidden, nn.Linear]
    assert [layer.bias is not None for layer in predictor if isinstance(layer, nn.Linear)] == [False, True]


@pytest.mark.parametrize("constant", [True, False])
def test_the_predictor_alone_keeps_its_learning_rate(constant):
    method = simsiam(constant_predictor_lr=constant)
    config = OptimConfig(name="sgd", lr=Schedule(value=0.05, final=0.0), lr_reference_batch=256)
    optimizer = build_optimizer(method, config)
    lr = config.effective_lr(512)
    assert write_values(optimizer, config, lr, Progress(6, 8, 1)) < 0.02
    for group in optimizer.param_groups:
        of_predictor = any(parameter is own for parameter in group["params"] for own in method.predictor.parameters())
        assert group["lr"] == (0.1 if of_predictor and constant else lr(Progress(6, 8, 1)))
