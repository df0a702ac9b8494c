"""Every loss keeps float32 and float64, computes half precision in float32 and is not caught by autocast."""

import pytest
import torch

from ssl_pipeline import losses


def rows(count=4, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOSSES = {
    "nt_xent": lambda to: losses.nt_xent(to(rows()), to(rows(seed=1)), temperature=0.04),
    "info_nce": lambda to: losses.info_nce(to(rows()), to(rows(seed=1)), to(rows(9, seed=2)), temperature=0.04),
    "moco_v3_loss": lambda to: losses.moco_v3_loss(*[to(rows(seed=seed)) for seed in range(4)], temperature=0.04),
    "byol_loss": lambda to: losses.byol_loss(*[to(rows(seed=seed)) for seed in range(4)]),
    "simsiam_loss": lambda to: losses.simsiam_loss(*[to(rows(seed=seed)) for seed in range(4)]),
    "self_distillation": lambda to: losses.self_distillation(
        to(torch.stack([rows(), rows(seed=1)])), to(rows()[None].softmax(-1)), temperature=0.04
    ),
    "centred_softmax": lambda to: losses.centred_softmax(to(rows()), to(rows(1)), temperature=0.04).max(),
    "mae_loss": lambda to: losses.mae_loss(
        to(rows()[None, None, :4, :4]), to(rows()[None, :, :4]), torch.ones(1, 4), patch_size=2, normalize_targets=True
    ),
    "removed_patches_loss": lambda to: losses.removed_patches_loss(
        to(rows()[None]), to(rows(seed=1)[None]), normalize_targets=True
    ),
    "gumbel_softmax": lambda to: losses.gumbel_softmax(
        to(rows()[:, :, None, None]), to(rows(seed=1)[:, :, None, None]), temperature=0.1
    ).max(),
    "uniform_kl_loss": lambda to: losses.uniform_kl_loss(to(rows()[:, :, None, None])),
    "logit_laplace_loss": lambda to: losses.logit_laplace_loss(
        to(rows().sigmoid()[None, None]), to(torch.stack([rows(), rows(seed=1)])[None])
    ),
    "masked_token_loss": lambda to: losses.masked_token_loss(to(rows()), torch.arange(4))[0],
    "feature_loss": lambda to: losses.feature_loss(to(rows()), to(rows(seed=1)), distance="cosine"),
    "simmim_loss": lambda to: losses.simmim_loss(
        to(rows()[None, None, :4, :4]), to(rows(seed=1)[None, None, :4, :4]), torch.ones(1, 4), patch_size=2
    ),
    "mixmatch_loss": lambda to: losses.mixmatch_loss(
        to(rows()), to(rows(seed=1).softmax(-1)), to(rows(seed=2)), to(rows(seed=3).softmax(-1)), unlabelled_weight=9
    )[0],
    "pi_model_loss": lambda to: losses.pi_model_loss(
        to(rows()), to(rows(seed=1)), torch.tensor([0, -1, 2, -1]), consistency_weight=9
    ),
    "probability_error": lambda to: losses.probability_error(to(rows()), to(rows(seed=1).softmax(-1))),
    "uda_loss": lambda to: losses.uda_loss(to(rows()), to(rows(seed=1)), threshold=0.3, temperature=0.4)[0],
    "annealed_cross_entropy": lambda to: losses.annealed_cross_entropy(
        to(rows()), torch.tensor([0, 1, 2, 3]), limit=0.5
    ),
    "fairness_loss": lambda to: losses.fairness_loss(
        to(rows()), torch.ones(4, dtype=torch.bool), to(rows(1)[0].softmax(-1)), to(rows(1, seed=1)[0].softmax(-1))
    ),
    "fixmatch_loss": lambda to: losses.fixmatch_loss(
        to(rows()), torch.tensor([0, 1, 2, 3]), to(rows(seed=1)), to(rows(seed=2)), threshold=0.3, unlabelled_weight=1
    )[0],
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_inputs_is_kept(loss, dtype):
    assert loss(lambda tensor: tensor.to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    promoted = loss(lambda tensor: tensor.to(dtype))
    assert promoted.dtype == torch.float32
    torch.testing.assert_close(promoted, loss(lambda tensor: tensor.to(dtype).float()), rtol=0, atol=0)


def test_autocast_does_not_change_the_loss(loss):
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(lambda tensor: tensor.float())
    torch.testing.assert_close(inside, loss(lambda tensor: tensor.float()), rtol=0, atol=0)


def test_without_the_decorator_autocast_would_change_it():
    a = rows().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (a.float() @ a.float().T).dtype == torch.bfloat16
        assert losses.float32(lambda x: x @ x.T)(a).dtype == torch.float32


def test_half_precision_inputs_receive_gradients_of_their_own_dtype():
    z1 = rows().bfloat16().requires_grad_()
    losses.nt_xent(z1, rows(seed=1).bfloat16(), temperature=0.1).backward()
    assert z1.grad.dtype == torch.bfloat16


def test_tensors_given_by_name_are_promoted_too():
    z = rows().half()
    assert losses.nt_xent(z1=z, z2=z, temperature=0.1).dtype == torch.float32
