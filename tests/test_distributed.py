"""Several processes are one process: gradients, collectives and whole runs (gloo, on the CPU)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_pipeline.backbones import BackboneConfig
from ssl_pipeline.distributed import (
    gather,
    gather_with_grad,
    logsumexp_over_ranks,
    max_over_ranks,
    mean_over_ranks,
    peer_failure,
    rank,
    world_size,
)
from ssl_pipeline.losses import (
    annealed_cross_entropy,
    barlow_twins_loss,
    fairness_loss,
    koleo_loss,
    moco_v3_loss,
    nnclr_loss,
    nt_xent,
    vicreg_loss,
)
from ssl_pipeline.methods.base import Method
from ssl_pipeline.modules.memory import FeatureQueue
from ssl_pipeline.modules.sync_batch_norm import synchronize_batch_norm
from ssl_pipeline.training.remarks import about_accumulation, about_batch_norm
from tests.ranks import run_on_ranks
from tests.tiny import CLASSES, CNN, CONFIGS, VIT, make_batch, make_method, progress_at, share_of

NAMES = sorted(CONFIGS)
NUM_IMAGES = 8
METRIC = "logged "


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Collectives


def collectives() -> dict[str, Tensor]:
    mine = torch.arange(6.0).reshape(3, 2) + 10 * rank()
    return {
        "gathered": gather(mine),
        "gathered with gradient": gather_with_grad(mine),
        "transposed": gather(mine.T),
        "integers": gather(torch.tensor([rank(), 7])),
        "mean": mean_over_ranks(mine.T),
        "max": max_over_ranks(torch.tensor([rank(), -rank()]).float()),
        "logsumexp": logsumexp_over_ranks(torch.tensor([3.0, -rank(), -torch.inf if rank() else 500.0])),
        "mine": mine,
    }


def test_collectives_put_the_ranks_together_in_their_order():
    first, second = run_on_ranks(collectives)
    for name in first:
        if name != "mine":
            assert torch.equal(first[name], second[name]), name
    expected = torch.tensor([[3.0, 0.0, 500.0], [3.0, -1.0, -torch.inf]]).logsumexp(dim=0)
    torch.testing.assert_close(first["logsumexp"], expected)
    both = torch.cat([first["mine"], second["mine"]])
    assert torch.equal(first["gathered"], both)
    assert torch.equal(first["gathered with gradient"], both)
    assert torch.equal(first["transposed"], torch.cat([first["mine"].T, second["mine"].T]))
    assert first["integers"].tolist() == [0, 7, 1, 7]
    assert torch.equal(first["mean"], (first["mine"] + 5).T)
    assert first["max"].tolist() == [1, 0]


def test_without_a_process_group_collectives_are_the_identity():
    value = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gather_with_grad(value) is value
    for collective in (gather, mean_over_ranks, max_over_ranks, logsumexp_over_ranks):
        assert torch.equal(collective(value.detach()), value)
    assert not gather(value).requires_grad
    assert not mean_over_ranks(value).requires_grad


def gather_gradient() -> Tensor:
    """d/dx of sum over ranks r of w_r . gathered."""
    mine = random(3, 2, seed=rank()).requires_grad_()
    weights = random(6, 2, seed=10 + rank())
    (gather_with_grad(mine) * weights).sum().backward()
    return mine.grad


def test_the_gradient_of_a_gather_is_the_sum_over_ranks():
    both = random(6, 2, seed=10) + random(6, 2, seed=11)
    gradients = run_on_ranks(gather_gradient)
    torch.testing.assert_close(torch.cat(gradients), both, rtol=0, atol=1e-15)


def test_an_error_that_is_no_lost_peer_stays_what_it_is():
    assert peer_failure(RuntimeError("gloo: Connection closed by peer")) is None, "there is no other process"
    assert peer_failure(ValueError("gloo")) is None


# Losses


def detach_the_others(local: Tensor) -> Tensor:
    """The common mistake: gather without gradient and put the own rows back."""
    parts = list(gather(local).chunk(world_size()))
    parts[rank()] = local
    return torch.cat(parts)


@contextmanager
def gathers_are(wrong: bool) -> Iterator[None]:
    """Inside, the losses gather as they should, or make that mistake."""
    with ExitStack() as patches:
        for name in [name for name in sys.modules if name.startswith("ssl_pipeline.losses.")]:
            if wrong and hasattr(sys.modules[name], "gather_with_grad"):
                patches.enter_context(mock.patch(f"{name}.gather_with_grad", detach_the_others))
        yield


def loss_gradients(name: str, wrong: bool) -> tuple[Tensor, Tensor]:
    """Mean loss over ranks and its gradient for the own rows, of 8 rows in all."""
    inputs = [random(8, 5, seed=seed).chunk(world_size())[rank()].clone().requires_grad_() for seed in range(4)]
    with gathers_are(wrong):
        loss = LOSSES[name](*inputs)
    loss.backward()
    # without a gradient, as the keys: zeros
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in inputs]
    return mean_over_ranks(loss), torch.stack(gradients) / world_size()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "fairness_loss": lambda z1, *_: fairness_loss(
        z1, z1[:, 0] > -0.5, random(5, seed=11).softmax(0), random(5, seed=12).softmax(0)
    ),
    "annealed_cross_entropy": lambda z1, z2, *_: annealed_cross_entropy(z1, z2.argmax(dim=1), limit=0.2),
    "barlow_twins_loss": lambda z1, z2, *_: barlow_twins_loss(z1, z2, off_diagonal_weight=0.1),
    "koleo_loss": lambda z1, *_: koleo_loss(z1, num_neighbours=2),
    "moco_v3_loss": lambda *inputs: moco_v3_loss(*inputs, temperature=0.3),
    "nnclr_loss": lambda *inputs: nnclr_loss(*inputs, random(20, 5, seed=9), temperature=0.3),
    "nt_xent": lambda z1, z2, *_: nt_xent(z1, z2, temperature=0.3),
    "vicreg_loss": lambda z1, z2, *_: vicreg_loss(
        z1, z2, invariance_weight=25, variance_weight=25, covariance_weight=1
    )[0],
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_over_two_ranks_is_that_of_the_global_batch(name):
    expected_loss, expected = loss_gradients(name, False)
    (loss, first), (_, second) = run_on_ranks(loss_gradients, name, False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "name", ["barlow_twins_loss", "fairness_loss", "koleo_loss", "nnclr_loss", "nt_xent", "vicreg_loss"]
)
def test_a_gather_that_drops_gradients_is_noticed(name):
    _, expected = loss_gradients(name, False)
    (_, first), (_, second) = run_on_ranks(loss_gradients, name, True)
    assert relative_gap({"": torch.cat([first, second], dim=1)}, {"": expected}) > 0.05


# Methods


def method_gradients(name: str, backbone: BackboneConfig, wrong: str) -> dict[str, Tensor]:
    """The gradients of one global batch in float64, after DDP's average, and the metrics as they are logged."""
    method = make_method(name, backbone=backbone).double()
    if wrong != "own batch norm":
        synchronize_batch_norm(method, torch.device("cpu"))
    network: nn.Module = method
    if world_size() > 1 and wrong != "no DDP":
        network = DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)
    for queue in method.modules():
        if isinstance(queue, FeatureQueue):
            queue.enqueue(nn.functional.normalize(random(*queue.features.shape, seed=5), dim=1))
    batch = share_of(make_batch(name, num_images=NUM_IMAGES, dtype=torch.float64), rank(), world_size())
    sum_codes = logsumexp_over_ranks if wrong != "own codes" else lambda sums: sums
    assignment = mock.patch("ssl_pipeline.losses.assignment.logsumexp_over_ranks", sum_codes)
    if wrong == "own draws":
        torch.manual_seed(rank())
    shared = "ssl_pipeline.modules.batch_mixing.copy_from_first_rank"
    own = mock.patch(shared) if wrong == "own draws" else nullcontext()
    with gathers_are(wrong == "gather"), assignment, own:
        output = network(batch, progress_at(1))
        output.loss.backward()
    logged = {METRIC + name: mean_over_ranks(value.double()) for name, value in output.metrics.items()}
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None} | logged


def relative_gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    expected = {name: tensor for name, tensor in expected.items() if not name.startswith(METRIC)}
    gap = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((gap / sum(tensor.square().sum() for tensor in expected.values())).sqrt())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_two_processes_are_those_of_one(name):
    expected = method_gradients(name, VIT, "")
    first, second = run_on_ranks(method_gradients, name, VIT, "")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert relative_gap(first, expected) < 1e-10
    logged = {key for key in expected if key.startswith(METRIC)}
    assert logged
    for key in logged:
        torch.testing.assert_close(
            first[key], expected[key], rtol=1e-5, atol=1e-6, msg=lambda told, key=key: key + told
        )


def test_gradients_through_synchronised_batch_norm_are_those_of_one_process():
    expected = method_gradients("simclr", CNN, "")
    first, _ = run_on_ranks(method_gradients, "simclr", CNN, "")
    assert relative_gap(first, expected) < 1e-10


CONTROLS = [
    ("simclr", "gather"),
    ("barlow_twins", "gather"),
    ("nnclr", "gather"),
    ("vicreg", "gather"),
    ("simclr", "own batch norm"),
    ("dino", "no DDP"),
    ("ibot", "no DDP"),
    ("dinov2", "gather"),
    ("dinov3", "own codes"),
    ("byol", "own batch norm"),
    ("mae", "no DDP"),
    ("simmim", "no DDP"),
    ("distillation", "no DDP"),
    ("beit", "no DDP"),
    ("dvae", "no DDP"),
    ("swav", "own codes"),
    ("mixmatch", "own draws"),
    ("remixmatch", "own draws"),
    ("supervised", "own draws"),
    ("adamatch", "no DDP"),
    ("freematch", "no DDP"),
    ("uda", "no DDP"),
    ("mean_teacher", "no DDP"),
    ("pi_model", "no DDP"),
    ("pseudo_label", "no DDP"),
    ("flexmatch", "no DDP"),
    ("softmatch", "no DDP"),
    ("temporal_ensembling", "no DDP"),
    ("co_training", "no DDP"),
    ("fixmatch", "no DDP"),
    ("moco", "no DDP"),
    ("moco_v3", "own batch norm"),
    ("simsiam", "own batch norm"),
]
"""A mistake for each method that the comparison of two processes with one must notice."""


def test_every_method_has_a_control():
    assert {name for name, _ in CONTROLS} == set(NAMES), "CONTRIBUTING.md (Add a method) says which mistake to take"


@pytest.mark.parametrize(("name", "wrong"), CONTROLS)
def test_a_wrong_gradient_is_noticed(name, wrong):
    expected = method_gradients(name, VIT, "")
    first, _ = run_on_ranks(method_gradients, name, VIT, wrong)
    assert relative_gap(first, expected) > 0.01


def after_steps(name: str) -> dict[str, Tensor]:
    """The state that two calls of after_step leave, with two micro-batches each."""
    method = make_method(name).double()
    synchronize_batch_norm(method, torch.device("cpu"))
    for step in (0, 1):
        carries = []
        for micro in (0, 1):
            batch = make_batch(name, num_images=NUM_IMAGES, seed=10 * step + micro, dtype=torch.float64)
            with torch.no_grad():
                carries.append(method(share_of(batch, rank(), world_size()), progress_at(step)).carry)
        with torch.no_grad():
            method.after_step(carries, progress_at(step))
    return {key: value for key, value in method.state_dict().items() if "running_" not in key}


@pytest.mark.parametrize("name", [n for n in NAMES if CLASSES[n].after_step is not Method.after_step])
def test_teachers_queues_and_centres_are_those_of_one_process(name):
    expected = after_steps(name)
    first, second = run_on_ranks(after_steps, name)
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-7, msg=key)


# Accumulation


def accumulated(name: str, num_parts: int) -> dict[str, Tensor]:
    """The gradients of one batch of 8 images in as many micro-batches, in float64, on this process."""
    method = make_method(name).double()
    for queue in method.modules():
        if isinstance(queue, FeatureQueue):
            queue.enqueue(nn.functional.normalize(random(*queue.features.shape, seed=5), dim=1))
    whole = make_batch(name, num_images=NUM_IMAGES, dtype=torch.float64)
    for part in range(num_parts):
        torch.manual_seed(0)
        (method(share_of(whole, part, num_parts), progress_at(1)).loss / num_parts).backward()
    return {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}


TIED = {name for name in NAMES if CLASSES[name].coupled_by} | {"byol", "simsiam"}  # these by the heads' batch norm
QUIET = {"freematch"}  # no image is above its threshold in the first steps, so there is no fairness yet


@pytest.mark.parametrize("name", NAMES)
def test_two_micro_batches_are_one_batch_unless_the_loss_ties_images_together(name):
    gap = relative_gap(accumulated(name, 2), accumulated(name, 1))
    assert gap > 1e-5 if name in TIED - QUIET else gap < 1e-7


@pytest.mark.parametrize("name", ["simclr", "moco_v3", "byol"])
def test_a_micro_batch_sees_itself_alone(name):
    """Negatives and batch norm: the gradient is the mean of those of the micro-batches, each a batch of its own."""
    whole = make_batch(name, num_images=NUM_IMAGES, dtype=torch.float64)
    alone = []
    for part in range(2):
        method = make_method(name).double()
        method(share_of(whole, part, 2), progress_at(1)).loss.backward()
        alone.append({key: p.grad for key, p in method.named_parameters() if p.grad is not None})
    mean = {key: (alone[0][key] + alone[1][key]) / 2 for key in alone[0]}
    assert relative_gap(accumulated(name, 2), mean) < 1e-12


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_log_says_what_a_micro_batch_does_not_see(name):
    told = about_accumulation(make_method(name), accumulate=4, micro_batch=16)
    assert (told is not None) == (name in TIED)
    if told is not None:
        assert told.startswith("train.accumulate=4: ")
        assert told.endswith("are those of a micro-batch of 16 images, not of the global batch of 64.")
    assert about_accumulation(make_method(name), accumulate=1, micro_batch=16) is None


@pytest.mark.parametrize(("name", "backbone", "said"), [("supervised", CNN, True), ("supervised", VIT, False)])
def test_the_log_says_where_batch_norm_is_of_one_process(name, backbone, said):
    method = make_method(name, backbone=backbone)
    told = about_batch_norm(method, shared=False, num_processes=2, batch_size=16)
    assert (told is not None) == said
    if told is not None:
        assert told.startswith(
            "train.sync_batch_norm=false: batch norm of Supervised takes its statistics from the 16 "
        )
    assert about_batch_norm(method, shared=True, num_processes=2, batch_size=16) is None
    assert about_batch_norm(method, shared=False, num_processes=1, batch_size=16) is None
