"""Losses by which a classifier agrees with itself: with another view, another time, or its own guess.

Mean Teacher (Tarvainen & Valpola, 2017, https://arxiv.org/abs/1703.01780), MixMatch (Berthelot et al., 2019,
https://arxiv.org/abs/1905.02249), the Pi-model and Temporal Ensembling (Laine & Aila, 2016,
https://arxiv.org/abs/1610.02242).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.losses.checks import check_same_logits
from ssl_pipeline.losses.precision import float32
from ssl_pipeline.losses.semi_supervised import weighted_cross_entropy

# Axes: B labelled images, or all of a step, U unlabelled ones, N rows of any kind, C classes.


@float32
def consistency_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distance: Literal["mse", "kl"] = "mse"
) -> Tensor:
    """How far the student's class probabilities are from the teacher's, which receive no gradient (Mean Teacher).

    Shapes: both (N, C), row i of both from image i; labelled images count too.

        mse:  mean over rows and classes of (softmax(student) - softmax(teacher))^2
        kl:   mean over rows of KL(softmax(teacher) || softmax(student))
    """
    check_same_logits("consistency_loss", student_logits=student_logits, teacher_logits=teacher_logits)
    if distance == "mse":
        return F.mse_loss(F.softmax(student_logits, dim=1), F.softmax(teacher_logits.detach(), dim=1))
    log_teacher, log_student = F.log_softmax(teacher_logits.detach(), dim=1), F.log_softmax(student_logits, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


@float32
def probability_error(logits_NC: Tensor, targets_NC: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """The mean over *all* rows and classes of weight * (softmax(logits) - target)^2; without weights they are 1.

    Shapes: logits and targets (N, C), targets probabilities; weights (N,), numbers or bool. Only the logits receive a
    gradient. MixMatch's unlabelled term, and the distance to an ensemble's targets (Laine & Aila, 2016).
    """
    check_same_logits("probability_error", logits=logits_NC, targets=targets_NC)
    error_NC = (F.softmax(logits_NC, dim=1) - targets_NC.detach()).square()
    return error_NC.mean() if weights_N is None else (error_NC.mean(dim=1) * weights_N.detach()).mean()


@float32
def mixmatch_loss(
    labelled_logits: Tensor,
    labelled_targets: Tensor,
    unlabelled_logits: Tensor,
    unlabelled_targets: Tensor,
    *,
    unlabelled_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """MixMatch's loss (equations 3 to 5), and its two terms, unweighted and detached.

    Shapes: labelled logits and targets (B, C), unlabelled ones (U, C); targets are probabilities without a gradient.

        labelled:    mean over B of -sum_c target * log softmax(logits)
        unlabelled:  mean over U *and classes* of (softmax(logits) - target)^2
        loss = labelled + unlabelled_weight * unlabelled
    """
    check_same_logits("mixmatch_loss", labelled_logits=labelled_logits, labelled_targets=labelled_targets)
    labelled = weighted_cross_entropy(labelled_logits, labelled_targets)
    unlabelled = probability_error(unlabelled_logits, unlabelled_targets)
    terms = {"labelled": labelled.detach(), "unlabelled": unlabelled.detach()}
    return labelled + unlabelled_weight * unlabelled, terms


@float32
def labelled_cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy summed over the rows with a label, divided by *all* B rows (Laine & Aila, 2016).

    Shapes: logits (B, C); labels (B,) int64, -1 where there is none. Without any label 0.
    """
    if logits_BC.ndim != 2 or len(logits_BC) == 0 or labels_B.shape != logits_BC.shape[:1]:
        raise ValueError(
            "labelled_cross_entropy needs logits (B, C) and labels (B,), B >= 1. "
            f"Got {tuple(logits_BC.shape)} and {tuple(labels_B.shape)}."
        )
    return F.cross_entropy(logits_BC, labels_B, ignore_index=-1, reduction="sum") / len(logits_BC)


@float32
def pi_model_loss(first_logits: Tensor, second_logits: Tensor, labels: Tensor, *, consistency_weight: float) -> Tensor:
    """The Pi-model's loss: labels for the first branch, and both branches alike (Laine & Aila, 2016,
    https://arxiv.org/abs/1610.02242).

    Shapes: both logits (B, C), row i of both from image i; labels (B,) int64, -1 where there is none.

        labelled_cross_entropy(first, labels)
        + consistency_weight * mean over rows and classes of (softmax(first) - softmax(second))^2

    Both branches receive a gradient.
    """
    check_same_logits("pi_model_loss", first_logits=first_logits, second_logits=second_logits)
    distance = F.mse_loss(F.softmax(first_logits, dim=1), F.softmax(second_logits, dim=1))
    return labelled_cross_entropy(first_logits, labels) + consistency_weight * distance
