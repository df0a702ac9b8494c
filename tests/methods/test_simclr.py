"""SimCLR's official objective and lightly's way of passing the views, as keys."""

from __future__ import annotations

import copy

import pytest
import torch

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, load
from ssl_pipeline.losses import nt_xent
from ssl_pipeline.methods.simclr import SimCLR, SimCLRConfig
from ssl_pipeline.schedule import Progress
from tests.methods.toys import toy_batches, toy_method

NOW = Progress(0, 10, 1)


def simclr(**changes):
    widths = {"projector_hidden_dim": 7, "projector_dim": 5, "projector_last_batch_norm": "affine"}
    return toy_method(SimCLR, SimCLRConfig(name="simclr", **(widths | changes)))


def test_the_official_objective_is_the_sum_of_two_means():
    (batch,) = toy_batches(1)
    plain, official = simclr(temperature=0.5), simclr(temperature=0.5, loss_scale=2.0)
    z1, z2 = copy.deepcopy(plain.encoder)(batch.views["view"].flatten(0, 1)).chunk(2)
    similarity = torch.nn.functional.normalize(torch.cat((z1, z2)), dim=1)
    logits = (similarity @ similarity.T / 0.5).fill_diagonal_(-torch.inf)
    num = len(z1)
    targets = torch.arange(2 * num).roll(num)
    means = [torch.nn.functional.cross_entropy(logits[part], targets[part]) for part in (slice(num), slice(num, None))]
    torch.testing.assert_close(official(batch, NOW).loss, sum(means))
    torch.testing.assert_close(official(batch, NOW).loss, 2 * plain(batch, NOW).loss)


def test_separate_passes_let_batch_norm_see_one_view_at_a_time():
    (batch,) = toy_batches(1)
    method = simclr(separate_passes=True)
    encoder = copy.deepcopy(method.encoder)
    z1, z2 = (encoder(view) for view in batch.views["view"])
    separate = method(batch, NOW).loss
    torch.testing.assert_close(separate, nt_xent(z1, z2, temperature=0.1))
    torch.testing.assert_close(
        method.state_dict(), {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    )
    assert not torch.isclose(separate, simclr()(batch, NOW).loss)


@pytest.mark.parametrize(
    ("name", "loss_scale", "separate", "lr_before_momentum"),
    [("simclr_resnet50", 2.0, False, True), ("cifar10_simclr_resnet18", 1.0, True, False)],
)
def test_the_recipes_follow_their_sources(name, loss_scale, separate, lr_before_momentum):
    config = load(PretrainConfig, [f"recipe={name}"], recipes=RECIPES)
    assert (config.method.loss_scale, config.method.separate_passes) == (loss_scale, separate)
    assert config.optim.lr_before_momentum == lr_before_momentum
