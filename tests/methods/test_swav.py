"""SwAV against its official code, written out, with queue and multi-crop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.losses import swav_loss
from ssl_pipeline.methods.swav import SwAV, SwAVConfig
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer, prepare_gradients, write_values
from ssl_pipeline.schedule import Duration, Progress, Schedule
from tests.methods.toys import assert_same_tensors, copies, descend, toy_batches, toy_method, train


def swav(**changes):
    settings = {"num_prototypes": 6, "projector_hidden_dim": 7, "projector_dim": 5}
    settings |= {"temperature": 0.2, "epsilon": 0.3, "freeze_prototypes_for": Duration(0)}
    return toy_method(SwAV, SwAVConfig(name="swav", **(settings | changes)))


def multi_crop_batches(num_steps):
    """Two large and two small crops of four images."""
    for large, small in zip(toy_batches(num_steps), list(toy_batches(num_steps + 1))[1:], strict=True):
        views = {"global": large.views["view"], "local": small.views["view"]}
        yield Batch(views, large.labels, large.sample_ids)


def official_codes(scores, epsilon):
    codes = torch.exp(scores / epsilon).T
    codes /= codes.sum()
    for _ in range(3):
        codes /= codes.sum(dim=1, keepdim=True) * len(codes)
        codes /= codes.sum(dim=0, keepdim=True) * codes.shape[1]
    return (codes / codes.sum(dim=0, keepdim=True)).T


@pytest.mark.parametrize("queue_size", [0, 8])
def test_steps_follow_the_official_code(queue_size):
    method = swav(queue_size=queue_size, queue_starts=Duration("1ep"))  # from the third step on
    network, weight = copies(*method.encoder.children()), nn.Parameter(method.prototypes.weight.detach().clone())
    queue, losses, read = torch.zeros(2, queue_size, 5, dtype=torch.float64), [], []
    for step, batch in enumerate(multi_crop_batches(7)):
        with torch.no_grad():
            weight /= weight.norm(dim=1, keepdim=True)
        features = [network[0](batch.views[name].flatten(0, 1)) for name in ("global", "local")]
        z = network[1](torch.cat(features))
        z = z / z.norm(dim=1, keepdim=True)
        scores, loss = z @ weight.T, 0.0
        for crop in (0, 1):
            own = slice(4 * crop, 4 * crop + 4)
            with torch.no_grad():
                rows = scores[own]
                if queue_size and step >= 2:
                    read.append(bool(queue[crop, -1].any()))
                    if read[-1]:
                        rows = torch.cat([queue[crop] @ weight.T, rows])
                    queue[crop, 4:] = queue[crop, :-4].clone()
                    queue[crop, :4] = z[own]
                codes = official_codes(rows, 0.3)[-4:]
            for other in {0, 1, 2, 3} - {crop}:
                prediction = (scores[4 * other : 4 * other + 4] / 0.2).softmax(dim=1).log()
                loss = loss - (codes * prediction).sum(dim=1).mean() / 3 / 2
        parameters = nn.ParameterList([*network.parameters(), weight])
        parameters.zero_grad()
        loss.backward()
        descend(parameters, lr=0.1)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, multi_crop_batches(7), lr=0.1), torch.stack(losses))
    assert_same_tensors(nn.Sequential(*method.encoder.children()), network)
    torch.testing.assert_close(method.prototypes.weight, weight / weight.norm(dim=1, keepdim=True))
    assert read == ([False] * 4 + [True] * 6 if queue_size else [])  # empty, half full, then read


def test_a_step_has_the_loss_of_whole_scores():
    method, (batch,) = swav(), multi_crop_batches(1)
    output = method(batch, Progress(0, 1, 1))
    network = nn.Sequential(*method.encoder.children())
    features = [network[0](batch.views[name].flatten(0, 1)) for name in ("global", "local")]
    scores = method.prototypes(nn.functional.normalize(network[1](torch.cat(features)), dim=1)).unflatten(0, (4, 4))
    expected = swav_loss(scores, temperature=0.2, epsilon=0.3, num_iterations=3)
    torch.testing.assert_close(output.loss, expected)


def test_the_defaults_are_the_official_ones():
    config = SwAVConfig(name="swav")
    assert (config.num_prototypes, config.projector_hidden_dim, config.projector_dim) == (3000, 2048, 128)
    assert (config.temperature, config.epsilon, config.sinkhorn_iterations) == (0.1, 0.05, 3)
    assert (config.queue_size, config.queue_starts, config.freeze_prototypes_for) == (0, "15ep", 313)


def test_the_projector_has_the_official_layers():
    head = swav().encoder.head
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert head[0].bias is not None
    assert head[3].bias is not None


def test_prototypes_are_frozen_at_first_and_always_of_length_1():
    method = swav(freeze_prototypes_for=Duration(2))
    config = OptimConfig(name="lars", lr=Schedule(value=5.0), weight_decay=Schedule(value=0.1))
    optimizer, weights = build_optimizer(method, config), [method.prototypes.weight.detach().clone()]
    for step, batch in enumerate(multi_crop_batches(4)):
        progress = Progress(step, 4, 2)
        output = method(batch, progress)
        output.loss.backward()
        write_values(optimizer, config, config.lr, progress)
        prepare_gradients(optimizer, config, progress)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step([output.carry], progress)
        weights.append(method.prototypes.weight.detach().clone())
    moved = [not torch.allclose(before, after) for before, after in itertools.pairwise(weights)]
    assert moved == [False, False, True, True]
    torch.testing.assert_close(torch.stack(weights).norm(dim=2), torch.ones(5, 6, dtype=torch.float64))


def test_a_queue_that_the_global_batch_does_not_divide_is_refused():
    facts = RunFacts(100, None, global_batch=5, view_sizes={"global": (2,)}, mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(
        ConfigError, match=r"^method\.queue_size must be a multiple of the global batch, 5, or 0\. Got 12; try 10\.$"
    ):
        swav(queue_size=12).prepare(facts)
    swav(queue_size=15).prepare(facts)
    swav(queue_size=0).prepare(facts)


def test_a_collapse_shows():
    method, (batch,) = swav(), multi_crop_batches(1)
    spread = method(batch, Progress(0, 1, 1)).metrics
    for views in batch.views.values():
        views[:] = views[:, :1]  # all images the same: only uniform codes are balanced
    collapsed = method(batch, Progress(0, 1, 1)).metrics
    assert collapsed["target_entropy"].item() == pytest.approx(math.log(6))
    assert spread["target_entropy"] < math.log(6) - 0.1
    assert collapsed["feature_std"] < 1e-6 < spread["feature_std"]


@pytest.mark.parametrize(
    ("name", "processes", "batch", "epochs", "lr", "queue"),
    [
        ("swav_resnet50", 64, 4096, 800, (0.3, 4.8, 0.0048, "10ep"), (0, 313)),
        ("swav_resnet50_400ep_bs256", 4, 256, 400, (0.0, 0.6, 0.0006, 0), (3840, 5005)),
    ],
)
def test_the_recipes_have_the_official_numbers(name, processes, batch, epochs, lr, queue):
    config = load(PretrainConfig, [f"recipe={name}"], recipes=RECIPES)
    schedule = config.optim.effective_lr(batch)
    assert (processes * config.data.batch_size, config.train.epochs, config.optim.name) == (batch, epochs, "lars")
    assert (schedule.start, schedule.value, schedule.final, schedule.warmup) == lr
    assert (config.method.queue_size, config.method.freeze_prototypes_for) == queue
    assert (config.data.std, config.optim.weight_decay.value) == ((0.228, 0.224, 0.225), pytest.approx(1e-6))
    assert [group.count for group in config.augment.values()] == [2, 6]
