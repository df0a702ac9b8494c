"""Sinkhorn-Knopp against its divisions, one after the other; alone and over two processes."""

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.distributed import rank, world_size
from ssl_pipeline.losses import centred_softmax, sinkhorn_knopp
from tests.ranks import run_on_ranks


def scores(num_rows=7, num_prototypes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_rows, num_prototypes, generator=generator, dtype=dtype) * 2 - 1


def sinkhorn_knopp_by_division(scores_NK, epsilon, num_iterations):
    """The definition as SwAV writes it."""
    num_rows, num_prototypes = scores_NK.shape
    codes = (scores_NK / epsilon).exp()
    codes = codes / codes.sum()
    for _ in range(num_iterations):
        for k in range(num_prototypes):
            codes[:, k] = codes[:, k] / codes[:, k].sum() / num_prototypes
        for n in range(num_rows):
            codes[n] = codes[n] / codes[n].sum() / num_rows
    return codes * num_rows


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_codes_equal_the_divisions(epsilon, num_iterations):
    codes = sinkhorn_knopp(scores(), epsilon=epsilon, num_iterations=num_iterations)
    assert_close(codes, sinkhorn_knopp_by_division(scores(), epsilon, num_iterations))


def test_two_rows_that_like_one_prototype_are_shared_out():
    """Row 0 likes prototype 0 more than row 1 does: after many iterations each has one."""
    codes = sinkhorn_knopp(torch.tensor([[1.0, 0.0], [0.9, 0.0]]), epsilon=0.005, num_iterations=100)
    assert_close(codes, torch.eye(2), rtol=0, atol=0.01)


def test_rows_sum_to_one_and_prototypes_nearly():
    codes = sinkhorn_knopp(scores(40, 5), epsilon=0.2, num_iterations=20)
    assert_close(codes.sum(dim=1), torch.ones(40, dtype=torch.float64))
    assert_close(codes.sum(dim=0), torch.full((5,), 8.0, dtype=torch.float64), rtol=0.01, atol=0)


@pytest.mark.parametrize("epsilon", [0.02, 1e-4])
def test_extreme_scores_stay_finite_in_float32(epsilon):
    extreme = torch.ones(6, 3)
    extreme[0] = torch.tensor([-1.0, -1.0, 1.0])
    extreme[1:, 2] = -1
    codes = sinkhorn_knopp(extreme, epsilon=epsilon, num_iterations=3)
    assert codes.isfinite().all()
    assert_close(codes.sum(dim=1), torch.ones(6))
    if epsilon == 0.02:
        expected = sinkhorn_knopp_by_division(extreme.double(), epsilon, 3)
        assert_close(codes.double(), expected, rtol=1e-4, atol=1e-6)


def test_codes_carry_no_gradient_and_half_precision_is_computed_in_float32():
    learnt = scores().requires_grad_()
    assert not sinkhorn_knopp(learnt, epsilon=0.05, num_iterations=3).requires_grad
    half = scores(dtype=torch.float32).bfloat16()
    codes = sinkhorn_knopp(half, epsilon=0.05, num_iterations=3)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, sinkhorn_knopp(half.float(), epsilon=0.05, num_iterations=3))


@pytest.mark.parametrize(
    ("shape", "settings", "sentence"),
    [
        ((2, 3), {"epsilon": 0.0, "num_iterations": 3}, "epsilon above 0. Got 0.0"),
        ((2, 3), {"epsilon": 0.05, "num_iterations": 0}, "num_iterations above 0. Got 0"),
        ((2, 3, 4), {"epsilon": 0.05, "num_iterations": 3}, r"\(N, K\). Got \(2, 3, 4\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(shape, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        sinkhorn_knopp(torch.zeros(shape), **settings)


def codes_of_a_share(counts):
    """The codes of this process's rows; the rows of all together are those of `scores`."""
    starts = [sum(counts[:number]) for number in range(len(counts) + 1)]
    mine = scores(sum(counts))[starts[rank()] : starts[rank() + 1]] if world_size() > 1 else scores(sum(counts))
    return sinkhorn_knopp(mine, epsilon=0.05, num_iterations=3)


@pytest.mark.parametrize("counts", [(4, 3), (7, 0)])
def test_codes_of_two_processes_are_those_of_one_with_all_rows(counts):
    parts = run_on_ranks(codes_of_a_share, counts)
    assert [len(part) for part in parts] == list(counts)
    assert_close(torch.cat(parts), codes_of_a_share(counts))
    if all(counts):
        alone = [sinkhorn_knopp(part, epsilon=0.05, num_iterations=3) for part in scores(7).split(counts)]
        assert (torch.cat(alone) - torch.cat(parts)).abs().max() > 0.05, "the control has to be noticed"


def test_centred_softmax_takes_the_centre_away_before_the_temperature():
    logits = torch.tensor([[2.0, 1.0]])
    probabilities = centred_softmax(logits, torch.tensor([1.0, 0.0]), temperature=0.5)
    assert_close(probabilities, torch.tensor([[0.5, 0.5]]))
    sharp = centred_softmax(logits, torch.zeros(1, 2), temperature=0.5)
    assert_close(sharp, torch.tensor([[2.0, 0.0]]).softmax(-1))
    with pytest.raises(ValueError, match=r"temperature above 0\. Got 0"):
        centred_softmax(logits, torch.zeros(2), temperature=0)
