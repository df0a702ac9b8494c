"""SwAV's swapped prediction (Caron et al., 2020, https://arxiv.org/abs/2006.09882): a crop predicts another's codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.losses.assignment import sinkhorn_knopp
from ssl_pipeline.losses.distillation import self_distillation
from ssl_pipeline.losses.precision import float32

# Axes: V crops of which the first A are assigned, B images, K prototypes, Q rows of a queue.


@float32
def swav_loss(
    scores_VBK: Tensor,
    queue_scores_AQK: Tensor | None = None,
    *,
    temperature: float,
    epsilon: float,
    num_iterations: int,
    num_assigned: int = 2,
) -> Tensor:
    """Mean cross-entropy of predicting the codes of each assigned crop from every other crop of the image.

    Shapes: scores (V, B, K) are unit embeddings times unit prototypes of V crops, of which the first `num_assigned` get
    codes by `sinkhorn_knopp`, each crop on its own; queue_scores (A, Q, K), one queue per assigned crop, are balanced
    together with it and then dropped. Codes and queues receive no gradient:

        mean over assigned a, v != a and b of  -sum_k codes[a,b,k] * log softmax(scores[v,b] / temperature)[k]

    With several processes each brings the scores of its own images, and of its share of the queue's rows. Raises
    ValueError for shapes that do not fit, or unless temperature, epsilon and num_iterations are above 0.
    """
    num_crops, num_images, num_prototypes = scores_VBK.shape if scores_VBK.ndim == 3 else (0, 0, 0)
    queue_shape = (num_assigned, num_prototypes)
    fits = queue_scores_AQK is None or (queue_scores_AQK.ndim == 3 and queue_scores_AQK.shape[::2] == queue_shape)
    if not 1 <= num_assigned <= num_crops or num_images == 0 or not fits:
        raise ValueError(
            f"swav_loss needs scores (V, B, K) of V >= num_assigned={num_assigned} crops and queue_scores "
            f"(num_assigned, Q, K) or none. Got {tuple(scores_VBK.shape)} and "
            f"{'none' if queue_scores_AQK is None else tuple(queue_scores_AQK.shape)}."
        )
    codes = []
    for crop in range(num_assigned):
        balanced = scores_VBK[crop].detach()
        if queue_scores_AQK is not None:
            balanced = torch.cat([queue_scores_AQK[crop].detach().to(balanced.dtype), balanced])
        codes.append(sinkhorn_knopp(balanced, epsilon=epsilon, num_iterations=num_iterations)[-num_images:])
    return self_distillation(scores_VBK, torch.stack(codes), temperature=temperature)
