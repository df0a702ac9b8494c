"""NNCLR against its pseudocode, written out, with its queue."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_pipeline.batch import RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.methods.nnclr import NNCLR, NNCLRConfig
from ssl_pipeline.schedule import Progress
from tests.methods.toys import assert_same_tensors, copies, descend, toy_batches, toy_method, train


def nnclr(**changes):
    settings = {"projector_hidden_dim": 7, "projector_dim": 5, "predictor_hidden_dim": 8, "queue_size": 12}
    return toy_method(NNCLR, NNCLRConfig(name="nnclr", **(settings | changes)))


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def cross_entropy(z, p, queue, temperature):
    """Of the pseudocode: neighbours of one view against the predictions of the other."""
    similarity = unit(z) @ queue.T
    neighbours = torch.stack([queue[max(range(len(queue)), key=row.tolist().__getitem__)] for row in similarity])
    probabilities = (neighbours @ unit(p).T / temperature).softmax(dim=1)
    return -sum(probabilities[i, i].log() for i in range(len(z))) / len(z)


def test_steps_follow_the_pseudocode():
    method = nnclr(temperature=0.2)
    encoder, predictor = copies(*method.encoder.children()), copies(method.predictor)
    networks, queue, losses = nn.ModuleList([encoder, predictor]), unit(method.queue.features), []
    for batch in toy_batches(10):
        z1, z2 = (encoder(view) for view in batch.views["view"])
        p1, p2 = predictor(z1), predictor(z2)
        loss = cross_entropy(z1, p2, queue, 0.2) / 2 + cross_entropy(z2, p1, queue, 0.2) / 2
        networks.zero_grad()
        loss.backward()
        descend(networks, lr=0.5)
        queue = torch.cat([queue[4:], unit(z1).detach()])  # the oldest four leave
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, toy_batches(10), lr=0.5), torch.stack(losses))
    assert_same_tensors(nn.ModuleList([nn.Sequential(*method.encoder.children()), method.predictor]), networks)
    oldest_first = method.queue.features.roll(-int(method.queue.position), dims=0)
    torch.testing.assert_close(oldest_first, queue)


def test_the_defaults_are_the_published_ones():
    config = NNCLRConfig(name="nnclr")
    assert (config.queue_size, config.temperature) == (98304, 0.1)
    assert (config.projector_hidden_dim, config.projector_dim, config.projector_layers) == (2048, 256, 3)
    assert config.predictor_hidden_dim == 4096


def test_heads_have_the_published_layers():
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    method = nnclr()
    assert [type(layer) for layer in method.encoder.head] == [*hidden, *hidden, nn.Linear, nn.BatchNorm1d]
    assert [type(layer) for layer in method.predictor] == [*hidden, nn.Linear]


def test_a_queue_that_the_global_batch_does_not_divide_is_refused():
    facts = RunFacts(100, None, global_batch=5, view_sizes={"view": (2,)}, mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(
        ConfigError, match=r"^method\.queue_size must be a multiple of the global batch, 5\. Got 12; try 10\.$"
    ):
        nnclr().prepare(facts)
    nnclr(queue_size=15).prepare(facts)


def test_a_collapse_shows():
    method = nnclr()
    (batch,) = toy_batches(1)
    spread = method(batch, Progress(0, 1, 1)).metrics["feature_std"]
    batch.views["view"][:] = batch.views["view"][:, :1]  # all images the same
    assert spread > 0.3
    assert method(batch, Progress(0, 1, 1)).metrics["feature_std"] < 1e-6


def test_the_recipe_has_the_published_numbers():
    config = load(PretrainConfig, ["recipe=nnclr_resnet50"], recipes=RECIPES)
    lr = config.optim.effective_lr(32 * config.data.batch_size)
    assert (32 * config.data.batch_size, config.train.epochs, config.optim.name) == (4096, 1000, "lars")
    assert (lr.value, lr.final, lr.warmup) == (pytest.approx(4.8), 0.0, "10ep")
    assert config.optim.weight_decay.value == pytest.approx(1e-6)
