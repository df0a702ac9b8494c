"""Contrastive losses: each view finds its other view among many.

NT-Xent is SimCLR's (Chen et al., 2020, https://arxiv.org/abs/2002.05709), InfoNCE with a queue MoCo's
(He et al., 2019, https://arxiv.org/abs/1911.05722), the symmetric, scaled form MoCo v3's (Chen et al., 2021,
https://arxiv.org/abs/2104.02057), and NNCLR (Dwibedi et al., 2021, https://arxiv.org/abs/2104.14548) lets nearest
neighbours look for the other view.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.distributed import gather, gather_with_grad, rank
from ssl_pipeline.losses.checks import check_positive
from ssl_pipeline.losses.precision import float32

# Axes: A anchors (the rows of this process), K keys (the rows of all processes), D dimensions.
# Logits in a chunk of NT-Xent: near a CPU's cache, or enough to fill a GPU (measured with 2,048 rows: 4 MB 220 ms,
# 64 MB 310 ms, all at once 570 ms on one core).
CPU_CHUNK, GPU_CHUNK = 2**20, 2**25


@float32
def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
    """Mean cross-entropy of finding, for each of 2N embeddings, the other view of its image among the 2N - 1 others.

    Shapes: z1, z2 (N, D), row i of both from image i, not normalised. With a = the 2N rows, normalised:

        mean over i of  -log( exp(a_i . a_positive(i) / temperature) / sum_{j != i} exp(a_i . a_j / temperature) )

    With several processes the sum runs over the rows of all of them and the mean over the own rows, so the average over
    processes is the loss of the global batch, gradients included; every process must bring the same N. The logits are
    computed in chunks of rows and never stored whole. With N = 1 on one process there is nothing to tell apart: 0.
    """
    _check_same_shape("nt_xent", z1=z1, z2=z2)
    anchors_AD = F.normalize(torch.cat([z1, z2]), dim=1)
    keys_KD = gather_with_grad(anchors_AD).view(-1, z1.shape[1])  # a tensor of its own, else torch.compile refuses
    return _NTXent.apply(anchors_AD, keys_KD, rank() * anchors_AD.shape[0], temperature)


@float32
def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, *, temperature: float) -> Tensor:
    """Mean cross-entropy of finding each query's key before all negatives, as MoCo v1 and v2.

    Shapes: queries and keys (N, D), row i of both from image i; negatives (K, D), for instance the queue. All are
    normalised here, and only the queries receive a gradient:

        mean over i of  -log( e(q_i . k_i) / (e(q_i . k_i) + sum_j e(q_i . n_j)) )  with e(x) = exp(x / temperature)
    """
    _check_same_shape("info_nce", queries=queries, keys=keys)
    if negatives.ndim != 2 or negatives.shape[1] != queries.shape[1]:
        raise ValueError(
            f"info_nce needs negatives of shape (K, {queries.shape[1]}) like the queries. Got {tuple(negatives.shape)}."
        )
    queries = F.normalize(queries, dim=1)
    keys = F.normalize(keys.detach(), dim=1)
    negatives = F.normalize(negatives.detach(), dim=1)
    positive = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


@float32
def moco_v3_loss(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, *, temperature: float) -> Tensor:
    """Both directions of MoCo v3: queries of one view against the momentum keys of the other.

    Shapes: all (N, D), row i of each from image i; normalised here. The negatives of a query are the other keys of the
    global batch; keys are gathered over the processes and receive no gradient. CE is the mean cross-entropy over rows:

        2 * temperature * (CE(q1 . k2 / temperature) + CE(q2 . k1 / temperature))
    """
    _check_same_shape("moco_v3_loss", q1=q1, q2=q2, k1=k1, k2=k2)
    return _one_direction(q1, k2, temperature) + _one_direction(q2, k1, temperature)


def _one_direction(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    keys = gather(F.normalize(keys.detach(), dim=1))
    logits = F.normalize(queries, dim=1) @ keys.T / temperature
    num_rows = len(queries)
    own_key = rank() * num_rows + torch.arange(num_rows, device=logits.device)
    # the factor makes the gradient's size independent of the temperature, and the published learning rates count on it
    return F.cross_entropy(logits, own_key) * (2 * temperature)


@float32
def nnclr_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, support: Tensor, *, temperature: float) -> Tensor:
    """Mean cross-entropy of finding, from the nearest neighbour of one view, the prediction of the other view.

    Shapes: p (predictions) and z (projections) of both views (N, D), row i of each from image i; support (Q, D), the
    projections of earlier batches. All are normalised here. nn(z) is the row of the support with the largest cosine to
    z; CE is the mean cross-entropy whose label for row i is column i:

        (CE(nn(z1) @ p2.T / temperature) + CE(nn(z2) @ p1.T / temperature)) / 2

    Only predictions receive a gradient; those of all processes are gathered with it. Raises ValueError for shapes that
    do not fit, or unless temperature > 0.
    """
    check_positive("nnclr_loss", temperature=temperature)
    _check_same_shape("nnclr_loss", p1=p1, p2=p2, z1=z1, z2=z2)
    if support.ndim != 2 or len(support) == 0 or support.shape[1] != p1.shape[1]:
        raise ValueError(
            f"nnclr_loss needs a support of shape (Q, {p1.shape[1]}) like the projections, Q >= 1. "
            f"Got {tuple(support.shape)}."
        )
    support = F.normalize(support.detach(), dim=1)
    return (_from_neighbours(z1, p2, support, temperature) + _from_neighbours(z2, p1, support, temperature)) / 2


def _from_neighbours(z: Tensor, p: Tensor, support: Tensor, temperature: float) -> Tensor:
    # the length of z changes no order of cosines
    nearest = support.index_select(0, (z.detach() @ support.T).argmax(dim=1))
    predictions = gather_with_grad(F.normalize(p, dim=1))
    num_rows = len(z)
    own_prediction = rank() * num_rows + torch.arange(num_rows, device=z.device)
    return F.cross_entropy(nearest @ predictions.T / temperature, own_prediction)


class _NTXent(torch.autograd.Function):
    """NT-Xent of normalised rows, in chunks: forward leaves the two gradients behind instead of the logits.

    Anchor i of this process is row first + i of the keys; anchors i and i + A/2 are the two views of one image.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, anchors_AD: Tensor, keys_KD: Tensor, first: int, temperature: float
    ) -> Tensor:
        num_anchors = anchors_AD.shape[0]
        gradient_AD, gradient_KD = torch.empty_like(anchors_AD), torch.zeros_like(keys_KD)
        own_A = torch.arange(num_anchors, device=anchors_AD.device)
        positive_A = first + (own_A + num_anchors // 2) % num_anchors
        own_A = first + own_A
        loss = anchors_AD.new_zeros(())
        chunk_size = CPU_CHUNK if anchors_AD.device.type == "cpu" else GPU_CHUNK
        num_rows = max(1, chunk_size // keys_KD.shape[0])
        for start in range(0, num_anchors, num_rows):
            chunk = slice(start, start + num_rows)
            logits = (anchors_AD[chunk] / temperature) @ keys_KD.T
            logits.scatter_(1, own_A[chunk, None], -torch.inf)
            positive = logits.gather(1, positive_A[chunk, None])
            largest = logits.amax(dim=1, keepdim=True)
            weights = logits.sub_(largest).exp_()
            total = weights.sum(dim=1, keepdim=True)
            loss += (total.log() + largest - positive).sum()
            # d loss / d logits = softmax - one at the positive; dividing D columns instead of K is cheaper
            torch.div(weights @ keys_KD, total, out=gradient_AD[chunk])
            gradient_KD.addmm_(weights.T, anchors_AD[chunk] / total)
        gradient_AD -= keys_KD[positive_A]
        gradient_KD[positive_A] -= anchors_AD
        scale = 1 / (temperature * num_anchors)
        ctx.save_for_backward(gradient_AD.mul_(scale), gradient_KD.mul_(scale))
        return loss / num_anchors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient_AD, gradient_KD = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * gradient_AD, gradient * gradient_KD, None, None


def _check_same_shape(loss: str, **tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] == 0:
        raise ValueError(
            f"{loss} needs {', '.join(tensors)} of one shape (N, D) with N >= 1. Got {', '.join(map(str, shapes))}."
        )
