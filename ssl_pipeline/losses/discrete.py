"""Losses over discrete codes of images.

The discrete VAE of DALL-E (Ramesh et al., 2021, https://arxiv.org/abs/2102.12092) and BEiT (Bao et al., 2021,
https://arxiv.org/abs/2106.08254).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.distributed import mean_over_ranks
from ssl_pipeline.losses.checks import check_positive
from ssl_pipeline.losses.precision import float32

# Axes: N images, K codes, R rows and C columns of cells, M masked patches.

MARGIN = 1e-4  # of pixels to 0 and 1, where their logit is not finite


@float32
def gumbel_softmax(logits_NKRC: Tensor, noise_NKRC: Tensor, *, temperature: float) -> Tensor:
    """(N, K, R, C): softmax over K of (logits + noise) / temperature, for noise drawn from the standard Gumbel
    distribution; never rounded to one code (Jang et al., 2016, https://arxiv.org/abs/1611.01144)."""
    check_positive("gumbel_softmax", temperature=temperature)
    return ((logits_NKRC + noise_NKRC) / temperature).softmax(dim=1)


@float32
def uniform_kl_loss(logits_NKRC: Tensor) -> Tensor:
    """KL(q || uniform) of each cell's q = softmax over K, mean over cells and images: sum_k q (log q + log K)."""
    log_q = F.log_softmax(logits_NKRC, dim=1)
    return (log_q.exp() * log_q).sum(dim=1).mean() + math.log(logits_NKRC.shape[1])


@float32
def logit_laplace_loss(images: Tensor, prediction: Tensor) -> Tensor:
    """Negative log-likelihood of pixels in (0, 1) whose logit has a Laplace distribution; it may be negative.

    Shapes: images x (N, C, H, W), prediction (N, 2 C, H, W): the C channels of mu, then those of ln b.

        mean over pixels and channels of  ln(2 b x (1 - x)) + |logit x - mu| / b

    DALL-E's pixels are 0.8 * pixel + 0.1. Pixels are kept 1e-4 away from 0 and 1.
    """
    channels = images.shape[1]
    if images.ndim != 4 or prediction.shape != (len(images), 2 * channels, *images.shape[2:]):
        raise ValueError(
            "logit_laplace_loss needs images (N, C, H, W) and a prediction (N, 2 C, H, W). "
            f"Got {tuple(images.shape)} and {tuple(prediction.shape)}."
        )
    x, mu, log_b = images.clamp(MARGIN, 1 - MARGIN), prediction[:, :channels], prediction[:, channels:]
    distance = (torch.logit(x) - mu).abs() * (-log_b).exp()
    return (log_b + (2 * x * (1 - x)).log() + distance).mean()


@float32
def masked_token_loss(logits_MK: Tensor, tokens_M: Tensor) -> tuple[Tensor, Tensor]:
    """BEiT's cross-entropy of the codes of masked patches, and the share of those that are guessed right.

    Both are sums over this process's rows divided by the mean number of rows of a process, so that the mean over
    processes is that over all masked patches. Nothing masked: 0, still differentiable.
    """
    if logits_MK.ndim != 2 or tokens_M.shape != logits_MK.shape[:1]:
        raise ValueError(
            f"masked_token_loss needs logits (M, K) and tokens (M,). Got {tuple(logits_MK.shape)} and "
            f"{tuple(tokens_M.shape)}."
        )
    num_rows = mean_over_ranks(logits_MK.new_full((), len(logits_MK)))
    num_rows = num_rows + (num_rows == 0)
    loss = F.cross_entropy(logits_MK, tokens_M, reduction="sum") / num_rows
    right = (logits_MK.detach().argmax(dim=1) == tokens_M).sum() / num_rows
    return loss, right
