"""Losses that keep the dimensions of an embedding from being redundant: no negatives and no teacher.

Barlow Twins (Zbontar et al., 2021, https://arxiv.org/abs/2103.03230) and VICReg (Bardes et al., 2021,
https://arxiv.org/abs/2105.04906). Statistics over the batch are those of the rows of all processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.distributed import gather_with_grad
from ssl_pipeline.losses.precision import float32

BATCH_NORM_EPS = 1e-5  # under the root of Barlow Twins' standard deviation: torch's batch norm
VARIANCE_EPS = 1e-4  # under that of VICReg's

# Axes: N rows, of this process or after `_gathered` of all; D dimensions.


@float32
def barlow_twins_loss(z1: Tensor, z2: Tensor, *, off_diagonal_weight: float) -> Tensor:
    """Squared distance of the cross-correlation between two views from the identity.

    Shapes: z1, z2 (N, D), row i of both from image i. With norm(z) = the columns of z less their mean over the batch,
    divided by sqrt(variance + 1e-5) (biased: batch norm without scale and shift), and c = norm(z1).T @ norm(z2) / N:

        sum over i of (c_ii - 1)^2 + off_diagonal_weight * sum over i != j of c_ij^2

    With several processes c is that of the global batch: each has the loss of the whole batch, and the average of their
    gradients is its gradient. Raises ValueError unless there are at least 2 rows, over all processes.
    """
    z1, z2 = _gathered("barlow_twins_loss", z1, z2)
    correlation_DD = _standardised(z1).T @ _standardised(z2) / len(z1)
    diagonal_D = correlation_DD.diagonal()
    off_diagonal = correlation_DD.square().sum() - diagonal_D.square().sum()
    return (diagonal_D - 1).square().sum() + off_diagonal_weight * off_diagonal


@float32
def vicreg_loss(
    z1: Tensor, z2: Tensor, *, invariance_weight: float, variance_weight: float, covariance_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of three terms; and the terms, unweighted and detached, by their names.

    Shapes: z1, z2 (N, D), row i of both from image i. Variance and covariance are unbiased (over N - 1):

        invariance = mean over rows and dimensions of (z1 - z2)^2
        variance   = mean over both views and dimensions of relu(1 - sqrt(variance of the column + 1e-4))
        covariance = sum over both views of (sum over i != j of covariance_ij^2) / D

    The invariance is that of the own rows, variance and covariance those of the rows of all processes. Raises
    ValueError unless there are at least 2 rows, over all processes.
    """
    views = _gathered("vicreg_loss", z1, z2)
    invariance = F.mse_loss(z1, z2)
    variance = torch.stack([_too_narrow(z) for z in views]).mean()
    covariance = torch.stack([_off_diagonal_covariance(z) for z in views]).sum()
    loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return loss, {name: term.detach() for name, term in terms.items()}


def _standardised(z_ND: Tensor) -> Tensor:
    variance_D, mean_D = torch.var_mean(z_ND, dim=0, correction=0)
    return (z_ND - mean_D) * (variance_D + BATCH_NORM_EPS).rsqrt()


def _too_narrow(z_ND: Tensor) -> Tensor:
    return F.relu(1 - (z_ND.var(dim=0) + VARIANCE_EPS).sqrt()).mean()


def _off_diagonal_covariance(z_ND: Tensor) -> Tensor:
    centred_ND = z_ND - z_ND.mean(dim=0)
    covariance_DD = centred_ND.T @ centred_ND / (len(z_ND) - 1)
    return (covariance_DD.square().sum() - covariance_DD.diagonal().square().sum()) / z_ND.shape[1]


def _gathered(loss: str, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all processes, with gradient."""
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"{loss} needs z1, z2 of one shape (N, D). Got {tuple(z1.shape)}, {tuple(z2.shape)}.")
    z1, z2 = gather_with_grad(torch.stack([z1, z2], dim=1)).unbind(dim=1)
    if len(z1) < 2:
        raise ValueError(f"{loss} needs at least 2 rows over all processes. Got {len(z1)}; try a larger batch.")
    return z1, z2
