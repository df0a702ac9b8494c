"""What features show without labels; floats out, float64 inside.

Of their spectrum RankMe, alpha-ReQ and LiDAR; of how they lie on the sphere uniformity, alignment and their deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

FEWEST_EIGENVALUES = 5  # for alpha-ReQ, which leaves out three
ROWS_AT_ONCE = 1024  # whose distances to all others are held together

# Axes: N images, Q views of each, D feature dimensions, K singular values or eigenvalues, descending.


def rankme(features: Tensor, *, eps: float = 1e-7) -> float:
    """Effective rank of features (N, D) as they are (RankMe, Garrido et al., 2022, https://arxiv.org/abs/2210.02885).

    exp(-sum over k of p_k log p_k), p_k = s_k / sum(s) + eps, s the min(N, D) singular values of the features, neither
    centred nor squared. About 1 where all features point one way, at most min(N, D).

    Raises ValueError for another shape or features that are not finite.
    """
    values_K = torch.linalg.svdvals(_checked(features, "rankme", dims=2))
    return _exp_entropy(values_K, eps=eps)


def alpha_req(features: Tensor, *, lo: int = 3, hi: int = 100) -> float:
    """How fast the eigenvalues of the covariance of features (N, D) fall, e_k ~ k^-alpha (Agrawal et al., 2022).

    Weighted least squares of log e_k on -log k over the ranks k = lo + 1 ... hi with weights 1 / k, e the eigenvalues
    of the covariance divided by their sum; where there are fewer than `hi`, those there are. Eigenvalues of 0 are
    none: N images have at most N - 1. The paper finds good features near 1.

    Raises ValueError for another shape, features that are not finite, or fewer than two eigenvalues in the range.
    """
    features_ND = _checked(features, "alpha_req", dims=2)
    centred_ND = features_ND - features_ND.mean(dim=0)
    # of the smaller product: the eigenvalues of the covariance, times N - 1; 5x as fast as singular values at D = 2048
    product = centred_ND.T @ centred_ND if len(centred_ND) > centred_ND.shape[1] else centred_ND @ centred_ND.T
    values_K, eps = torch.linalg.eigvalsh(product).flip(0), torch.finfo(product.dtype).eps
    rounding = max(features_ND.shape) * eps * torch.maximum(values_K[0], eps * features_ND.square().sum())
    eigenvalues_K = values_K[values_K > rounding]
    chosen = (eigenvalues_K / eigenvalues_K.sum())[lo:hi]
    if len(chosen) < 2:
        raise ValueError(
            f"alpha_req needs two eigenvalues or more of the ranks {lo + 1} to {hi}. Features {tuple(features.shape)} "
            f"have {len(eigenvalues_K)} in all; take more images, or a smaller lo."
        )
    ranks = torch.arange(lo + 1, lo + 1 + len(chosen), dtype=chosen.dtype, device=chosen.device)
    weights, x, y = 1 / ranks, -ranks.log(), chosen.log()
    x_mean, y_mean = ((weights * values).sum() / weights.sum() for values in (x, y))
    slope = (weights * (x - x_mean) * (y - y_mean)).sum() / (weights * (x - x_mean).square()).sum()
    return slope.item()


def lidar(embeddings_NQD: Tensor, *, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """Effective rank of what distinguishes images but not their views (LiDAR, Thilak et al., 2023, arXiv:2312.04000).

    Shapes: N images, Q views of each. Sb = covariance of the N means, / (N - 1); Sw = covariance within images,
    / (N (Q - 1)), + delta * identity; e = eigenvalues of Sw^(-1/2) Sb Sw^(-1/2); p = e / sum(e) + eps;
    exp(-sum p log p).

    Raises ValueError for another shape, N or Q below 2, or embeddings that are not finite.
    """
    embeddings = _checked(embeddings_NQD, "lidar", dims=3)
    num_images, num_views, dim = embeddings.shape
    if num_images < 2 or num_views < 2:
        raise ValueError(f"lidar needs two images or more and two views of each. Got {tuple(embeddings.shape)}.")
    means_ND = embeddings.mean(dim=1)
    within_XD = (embeddings - means_ND[:, None]).flatten(0, 1)
    within_DD = within_XD.T @ within_XD / (num_images * (num_views - 1))
    within_DD += delta * torch.eye(dim, dtype=within_DD.dtype, device=within_DD.device)
    centred_ND = means_ND - means_ND.mean(dim=0)
    # Sw = L L^T: the matrix L^-1 Sb L^-T has the eigenvalues of Sw^(-1/2) Sb Sw^(-1/2)
    whitened_DN = torch.linalg.solve_triangular(torch.linalg.cholesky(within_DD), centred_ND.T, upper=False)
    # of the smaller product, whose eigenvalues are those of the other, which has additional zeros
    product = whitened_DN @ whitened_DN.T if dim <= num_images else whitened_DN.T @ whitened_DN
    values_K = torch.linalg.eigvalsh(product / (num_images - 1)).clamp(min=0)
    eigenvalues_D = torch.cat([values_K, values_K.new_zeros(dim - len(values_K))])
    return _exp_entropy(eigenvalues_D, eps=eps)


def uniformity(features: Tensor, *, t: float = 2.0) -> float:
    """How evenly features (N, D) cover the sphere (Wang & Isola, 2020, https://arxiv.org/abs/2005.10242, section 4).

    log of the mean over pairs i != j of exp(-t |x_i - x_j|^2), x the features at length 1. 0 where all are the same;
    about -2 t for many that lie evenly in many dimensions. Features of length 0 lie at the origin.

    Raises ValueError for another shape, fewer than two features, or features that are not finite.
    """
    unit_ND = normalize(_checked(features, "uniformity", dims=2), dim=1)
    count = len(unit_ND)
    if count < 2:
        raise ValueError("uniformity needs two features or more. Got one.")
    total = unit_ND.new_zeros(())
    for first in range(0, count, ROWS_AT_ONCE):
        rows_RD = unit_ND[first : first + ROWS_AT_ONCE]
        squares_RN = rows_RD.square().sum(dim=1, keepdim=True) + unit_ND.square().sum(dim=1) - 2 * rows_RD @ unit_ND.T
        total += (-t * squares_RN.clamp(min=0)).exp().sum()
    return ((total - count) / (count * (count - 1))).log().item()  # each is a pair with itself, which counts 1


def alignment(first_ND: Tensor, second_ND: Tensor, *, power: float = 2.0) -> Tensor:
    """How near the features of two views of each image are (Wang & Isola, 2020, section 4): (N,), whose mean it is.

    |x_i - y_i|^power of the features at length 1: 0 where views make no difference, 2 (with power 2) where views of
    an image are no nearer than those of others.

    Raises ValueError for other or different shapes, or features that are not finite.
    """
    if first_ND.shape != second_ND.shape:
        raise ValueError(
            f"alignment needs features of the same images. Got {tuple(first_ND.shape)} and {tuple(second_ND.shape)}."
        )
    first, second = (normalize(_checked(part, "alignment", dims=2), dim=1) for part in (first_ND, second_ND))
    return (first - second).norm(dim=1) ** power


def feature_std(features: Tensor) -> float:
    """How far features (N, D) are spread over the sphere, as methods log it: about 1 if evenly, 0 if all are the same.

    The standard deviation over images of the features at length 1, averaged over dimensions, times sqrt(D).

    Raises ValueError for another shape or features that are not finite.
    """
    unit_ND = normalize(_checked(features, "feature_std", dims=2), dim=1)
    return (unit_ND.std(dim=0, correction=0).mean() * unit_ND.shape[1] ** 0.5).item()


def _exp_entropy(values_K: Tensor, *, eps: float) -> float:
    """exp(-sum p log p) of p = values / sum + eps, 0 log 0 = 0; all zeros are as few dimensions as can be."""
    shares_K = values_K / values_K.sum().clamp(min=torch.finfo(values_K.dtype).tiny) + eps
    return torch.special.entr(shares_K).sum().exp().item()


def _checked(features: Tensor, name: str, *, dims: int) -> Tensor:
    """The features in float64."""
    if features.ndim != dims or not features.numel():
        raise ValueError(f"{name} needs features with {dims} axes and no empty one. Got shape {tuple(features.shape)}.")
    if not features.isfinite().all():
        raise ValueError(f"{name} needs finite features. Some are NaN or infinite.")
    return features.detach().double()
