"""BYOL against the update order of its official code, written out."""

import math

import torch
from torch import nn

from ssl_pipeline.methods.byol import BYOL, BYOLConfig
from ssl_pipeline.schedule import Progress, Schedule
from tests.methods.toys import assert_same_tensors, copies, descend, follow, toy_batches, toy_method, train


def byol(**changes):
    widths = {"projector_hidden_dim": 7, "projector_dim": 5, "predictor_hidden_dim": 8}
    momentum = {"teacher_momentum": Schedule(value=0.7, final=1.0)}
    return toy_method(BYOL, BYOLConfig(name="byol", **(widths | momentum | changes)))


def squared_distance(prediction, target):
    return (prediction / prediction.norm() - target / target.norm()).square().sum()


def test_steps_follow_the_official_code():
    num_steps = 4
    method = byol()
    online = copies(method.student.backbone, method.student.head, method.predictor)
    target, losses = copies(method.student.backbone, method.student.head), []
    for step, batch in enumerate(toy_batches(num_steps)):
        first, second = batch.views["view"]
        p1, p2 = online(first), online(second)
        with torch.no_grad():
            z1, z2 = target(first), target(second)  # with the statistics of this batch, as the online network
        loss = sum(squared_distance(p1[i], z2[i]) + squared_distance(p2[i], z1[i]) for i in range(4)) / 4
        online.zero_grad()
        loss.backward()
        descend(online, lr=0.5)
        follow(target, online[:2], 1 - 0.3 * (math.cos(math.pi * step / num_steps) + 1) / 2)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, toy_batches(num_steps), lr=0.5), torch.stack(losses))
    assert_same_tensors(nn.Sequential(*method.student.children(), method.predictor), online)
    assert_same_tensors(method.teacher.network, target)


def test_the_defaults_are_those_of_the_longest_run():
    config = BYOLConfig(name="byol")
    assert (config.projector_hidden_dim, config.projector_dim, config.predictor_hidden_dim) == (4096, 256, 4096)
    momentum = [config.teacher_momentum(Progress(step, 10, 1)) for step in (0, 5, 10)]
    torch.testing.assert_close(momentum, [0.996, 0.998, 1.0])


def test_heads_have_the_official_layers():
    for head in (byol().student.head, byol().predictor):
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert (head[0].bias is not None, head[3].bias is not None) == (True, False)


def test_a_teacher_that_agrees_leaves_no_loss():
    method = byol(predictor_hidden_dim=5)
    method.predictor = nn.Identity()
    (batch,) = toy_batches(1)
    batch.views["view"][1] = batch.views["view"][0]
    torch.testing.assert_close(method(batch, Progress(0, 1, 1)).loss.item(), 0.0)
