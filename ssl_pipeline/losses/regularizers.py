"""Additional terms of a self-distillation: class tokens that spread out, patches that stay as alike as they were.

KoLeo (Sablayrolles et al., 2018, https://arxiv.org/abs/1806.03198; DINOv2, Oquab et al., 2023,
https://arxiv.org/abs/2304.07193) and Gram anchoring (DINOv3, Simeoni et al., 2025, https://arxiv.org/abs/2508.10104).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.distributed import gather_with_grad, rank
from ssl_pipeline.losses.precision import float32

DISTANCE_EPS = 1e-8  # under KoLeo's logarithm
Negatives = Literal["kept", "removed", "teacher_removed"]

# Axes: N rows of this process, A of all processes (or N), n neighbours, L patches, D dimensions.


@float32
def koleo_loss(features_ND: Tensor, *, num_neighbours: int = 1, per_process: bool = False) -> Tensor:
    """Minus the mean log distance of each row to its nearest others: small where the rows spread over the sphere.

    Shapes: features (N, D), L2-normalised inside. With the `num_neighbours` other rows j of largest dot product:

        mean over rows i and their neighbours j of  -log(|x_i - x_j| + 1e-8)

    Both ends of a pair receive a gradient. Neighbours are looked for among the rows of all processes, or with
    `per_process` among the own ones, as in the official recipes; then the value depends on the number of processes.
    Raises ValueError unless there are more rows than neighbours.
    """
    if features_ND.ndim != 2 or num_neighbours < 1:
        raise ValueError(
            f"koleo_loss needs features (N, D) and num_neighbours of at least 1. "
            f"Got {tuple(features_ND.shape)} and {num_neighbours}."
        )
    rows_ND = F.normalize(features_ND, dim=1)
    others_AD = rows_ND if per_process else gather_with_grad(rows_ND)
    if len(others_AD) <= num_neighbours:
        raise ValueError(
            f"koleo_loss needs more rows than num_neighbours={num_neighbours}. Got {len(others_AD)}; "
            "try a larger batch."
        )
    with torch.no_grad():
        similarity_NA = rows_ND @ others_AD.T
        similarity_NA.diagonal(0 if per_process else rank() * len(rows_ND)).fill_(-torch.inf)  # each row to itself
        nearest_Nn = similarity_NA.topk(num_neighbours, dim=1).indices
    distances_Nn = torch.linalg.vector_norm(rows_ND[:, None] - others_AD[nearest_Nn], dim=2)
    return -(distances_Nn + DISTANCE_EPS).log().mean()


@float32
def gram_anchoring_loss(
    student: Tensor, teacher: Tensor, *, normalize: bool = True, negatives: Negatives = "kept"
) -> Tensor:
    """Mean squared difference between the student's and the teacher's Gram matrix of patches.

    Shapes: (N, L, D), one Gram matrix for the patches of each image; or (M, D), one for all rows. Widths may differ.
    Rows are L2-normalised if `normalize`; the teacher receives no gradient:

        mean over all entries, diagonals included, of  (student @ student.T - teacher @ teacher.T)^2

    negatives: "removed" puts 0 for negative entries of both matrices (those of the student then have no gradient),
    "teacher_removed" only for those of the teacher. Raises ValueError for anything else, or for other numbers of rows.
    """
    if student.ndim not in (2, 3) or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "gram_anchoring_loss needs student and teacher as (N, L, D) or (M, D) with the same rows. "
            f"Got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if negatives not in get_args(Negatives):
        raise ValueError(f"gram_anchoring_loss needs negatives of {', '.join(get_args(Negatives))}. Got {negatives!r}.")
    student_gram, teacher_gram = (_gram(rows, normalize=normalize) for rows in (student, teacher.detach()))
    if negatives != "kept":
        teacher_gram = F.relu(teacher_gram)
    if negatives == "removed":
        student_gram = F.relu(student_gram)
    return F.mse_loss(student_gram, teacher_gram)


def _gram(rows: Tensor, *, normalize: bool) -> Tensor:
    if normalize:
        rows = F.normalize(rows, dim=-1)
    return rows @ rows.transpose(-1, -2)
