"""MoCo v3 against the update order of its pseudocode, written out."""

import math

import torch
from torch import nn

from ssl_pipeline.methods.moco_v3 import MoCoV3, MoCoV3Config
from ssl_pipeline.schedule import Progress, Schedule
from tests.methods.toys import assert_same_tensors, copies, descend, follow, toy_batches, toy_method, train


def moco_v3(**changes):
    widths = {"projector_hidden_dim": 7, "projector_dim": 5, "predictor_hidden_dim": 8}
    momentum = {"teacher_momentum": Schedule(value=0.7, final=1.0)}
    return toy_method(MoCoV3, MoCoV3Config(name="moco_v3", temperature=0.3, **(widths | momentum | changes)))


def one_direction(queries, keys, temperature):
    """2 * temperature times the cross-entropy of finding key i with query i among all keys."""
    queries = queries / queries.norm(dim=1, keepdim=True)
    keys = keys / keys.norm(dim=1, keepdim=True)
    losses = []
    for i, query in enumerate(queries):
        scores = [(query @ key / temperature).exp() for key in keys]
        losses.append(-(scores[i] / sum(scores)).log())
    return 2 * temperature * sum(losses) / len(losses)


def test_steps_follow_the_pseudocode():
    num_steps = 4
    method = moco_v3()
    query = copies(method.student.backbone, method.student.head, method.predictor)
    key, losses = copies(method.student.backbone, method.student.head), []
    for step, batch in enumerate(toy_batches(num_steps)):
        first, second = batch.views["view"]
        q1, q2 = query(first), query(second)
        momentum = 1 - 0.5 * (1 + math.cos(math.pi * step / num_steps)) * 0.3
        with torch.no_grad():
            follow(key, query[:2], momentum)
            k1, k2 = key(first), key(second)
        loss = one_direction(q1, k2, 0.3) + one_direction(q2, k1, 0.3)
        query.zero_grad()
        loss.backward()
        descend(query, lr=0.5)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, toy_batches(num_steps), lr=0.5), torch.stack(losses))
    assert_same_tensors(nn.Sequential(*method.student.children(), method.predictor), query)
    # ours is updated for step 4 already, where the momentum is 1
    assert_same_tensors(method.teacher.network, key)


def test_the_teacher_has_no_predictor():
    method = moco_v3()
    assert len(list(method.teacher.parameters())) == len(list(method.student.parameters()))
    assert [name.split(".")[0] for name, _ in method.teacher.network.named_children()] == ["backbone", "head"]


def test_the_defaults_are_those_of_vits():
    config = MoCoV3Config(name="moco_v3")
    assert (config.temperature, config.projector_layers, config.predictor_last_batch_norm) == (0.2, 3, "no_affine")
    assert (config.projector_hidden_dim, config.projector_dim, config.predictor_hidden_dim) == (4096, 256, 4096)
    momentum = [config.teacher_momentum(Progress(step, 10, 1)) for step in (0, 5, 10)]
    torch.testing.assert_close(momentum, [0.99, 0.995, 1.0])


def layers_of(head):
    words = {nn.Linear: "linear", nn.ReLU: "relu", nn.BatchNorm1d: "norm"}
    return [words[type(layer)] + ("" if getattr(layer, "affine", True) else " plain") for layer in head]


def test_heads_have_the_official_layers():
    hidden = ["linear", "norm", "relu"]
    vit = moco_v3()
    assert layers_of(vit.student.head) == [*hidden, *hidden, "linear", "norm plain"]
    assert layers_of(vit.predictor) == [*hidden, "linear", "norm plain"]
    resnet = moco_v3(projector_layers=2, predictor_last_batch_norm="none")
    assert layers_of(resnet.student.head) == [*hidden, "linear", "norm plain"]
    assert layers_of(resnet.predictor) == [*hidden, "linear"]
    heads = nn.ModuleList([vit.student.head, vit.predictor, resnet.student.head, resnet.predictor])
    assert all(layer.bias is None for layer in heads.modules() if isinstance(layer, nn.Linear))
