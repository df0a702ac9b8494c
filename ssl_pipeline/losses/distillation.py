"""Losses of a student that predicts what a teacher, or its other half, says of the same image.

DINO (Caron et al., 2021, https://arxiv.org/abs/2104.14294), BYOL (Grill et al., 2020, https://arxiv.org/abs/2006.07733)
and SimSiam (Chen & He, 2020, https://arxiv.org/abs/2011.10566); and the distance to the features of a frozen teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.losses.checks import check_positive
from ssl_pipeline.losses.precision import float32

# Axes: S student crops of which the first T are the teacher's, B images, K prototypes.


@float32
def self_distillation(
    student_SBK: Tensor, teacher_TBK: Tensor, *, temperature: float, leave_out_same_crop: bool = True
) -> Tensor:
    """Mean cross-entropy of each student crop against each teacher crop of the same image, same crops left out.

    Shapes: `student_SBK` are logits of S crops, `teacher_TBK` probabilities of the first T of these crops; they receive
    no gradient. Equation 3 of DINO:

        mean over b and s != t of  -sum_k teacher[t,b,k] * log softmax(student[s,b] / temperature)[k]

    With `leave_out_same_crop=False` the mean is over all S * T pairs, and the teacher's crops may be any of the image.
    Raises ValueError if no pair is left (S < 2), if the teacher's crops are not among the student's, or unless
    temperature > 0.
    """
    check_positive("self_distillation", temperature=temperature)
    check_crops(student_SBK, teacher_TBK, leave_out_same_crop=leave_out_same_crop)
    num_student, num_teacher = student_SBK.shape[0], teacher_TBK.shape[0]
    teacher_TBK = teacher_TBK.detach()
    log_student_SBK = F.log_softmax(student_SBK / temperature, dim=-1)
    # The sum over all pairs needs the teacher crops only summed; the pairs s = t are then taken back.
    all_pairs = torch.einsum("sbk,bk->", log_student_SBK, teacher_TBK.sum(dim=0))
    if not leave_out_same_crop:
        return -all_pairs / (num_student * num_teacher * student_SBK.shape[1])
    same_crop = torch.einsum("tbk,tbk->", log_student_SBK[:num_teacher], teacher_TBK)
    num_pairs = num_teacher * (num_student - 1)
    return (same_crop - all_pairs) / (num_pairs * student_SBK.shape[1])


@float32
def byol_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Squared distance between normalised predictions and the teacher's projections, both directions summed.

    Shapes: all (N, D); p predictions, z projections of the other branch, which receive no gradient.

        mean over rows of  4 - 2 cos(p1, z2) - 2 cos(p2, z1)
    """
    return 4 - 2 * (_mean_cosine(p1, z2) + _mean_cosine(p2, z1))


@float32
def simsiam_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Negative cosine between predictions and projections with the gradient stopped, both directions averaged.

    Shapes: all (N, D); p predictions, z projections, which receive no gradient.

        mean over rows of  -(cos(p1, z2) + cos(p2, z1)) / 2
    """
    return -(_mean_cosine(p1, z2) + _mean_cosine(p2, z1)) / 2


@float32
def feature_loss(student: Tensor, teacher: Tensor, *, distance: Literal["cosine", "mse", "smooth_l1"]) -> Tensor:
    """Mean distance of a student's features to a frozen teacher's, which receive no gradient.

    Shapes: both (..., D), for instance (N, D) of images or (N, L, D) of patches; d = student - teacher.

        cosine:     mean over rows of  1 - cos(student, teacher)
        mse:        mean over rows and dimensions of  d^2
        smooth_l1:  mean over rows and dimensions of  d^2 / 2 where |d| < 1, else |d| - 1/2
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"feature_loss needs student and teacher of one shape. Got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    teacher = teacher.detach()
    if distance == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
    return (F.mse_loss if distance == "mse" else F.smooth_l1_loss)(student, teacher)


def check_crops(student: Tensor, teacher: Tensor, *, leave_out_same_crop: bool) -> None:
    """Raises ValueError unless the crops (S, B, ...) of the student and (T, B, ...) of the teacher make a pair."""
    num_student, num_teacher = student.shape[0], teacher.shape[0]
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            "self_distillation needs student (S, B, K) and teacher (T, B, K). "
            f"Got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if leave_out_same_crop and (num_student < 2 or not 1 <= num_teacher <= num_student):
        raise ValueError(
            "self_distillation needs at least 2 student crops and between 1 and as many teacher crops. "
            f"Got {num_student} and {num_teacher}."
        )
    if min(num_student, num_teacher) < 1:
        raise ValueError(f"self_distillation needs a crop of each. Got {num_student} and {num_teacher}.")


def _mean_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    if predictions.ndim != 2 or predictions.shape != targets.shape:
        raise ValueError(
            "predictions and projections must have one shape (N, D). "
            f"Got {tuple(predictions.shape)} and {tuple(targets.shape)}."
        )
    return F.cosine_similarity(predictions, targets.detach(), dim=1).mean()
