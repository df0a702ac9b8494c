"""Losses that join a few labels with many images, and what makes targets of predictions.

FixMatch (Sohn et al., 2020, https://arxiv.org/abs/2001.07685), MixMatch (Berthelot et al., 2019,
https://arxiv.org/abs/1905.02249), ReMixMatch (https://arxiv.org/abs/1911.09785), AdaMatch (Berthelot et al., 2021,
https://arxiv.org/abs/2106.04732), Mean Teacher (Tarvainen & Valpola, 2017, https://arxiv.org/abs/1703.01780), the
Pi-model and Temporal Ensembling (Laine & Aila, 2016, https://arxiv.org/abs/1610.02242) and UDA (Xie et al., 2019,
https://arxiv.org/abs/1904.12848).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.distributed import gather, gather_with_grad, mean_over_ranks, world_size
from ssl_pipeline.losses.checks import check_positive
from ssl_pipeline.losses.precision import float32

# Axes: B labelled images, U unlabelled ones, N rows of any kind, C classes, V views.


@float32
def fixmatch_loss(
    labelled_logits: Tensor,
    labels: Tensor,
    weak_logits: Tensor,
    strong_logits: Tensor,
    *,
    threshold: float,
    unlabelled_weight: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the labels, and on the classes that the weak views predict with confidence for the strong ones.

    Shapes: labelled_logits (B, C), labels (B,) int64; weak_logits and strong_logits (U, C), row i of both from image i.
    Returns the loss and the boolean kept (U,) of `pseudo_label_loss`:

        mean over B of CE(labelled, labels) + unlabelled_weight * pseudo_label_loss(softmax(weak), strong)

    The weak views receive no gradient. With nothing kept the second term is 0.
    """
    if weak_logits.shape != strong_logits.shape or weak_logits.shape[1:] != labelled_logits.shape[1:]:
        raise ValueError(
            "fixmatch_loss needs weak and strong logits of one shape and as many classes as the labelled ones. "
            f"Got {tuple(weak_logits.shape)}, {tuple(strong_logits.shape)} and {tuple(labelled_logits.shape)}."
        )
    probabilities_UC = F.softmax(weak_logits.detach(), dim=1)
    unlabelled, kept = pseudo_label_loss(probabilities_UC, strong_logits, threshold=threshold)
    return weighted_cross_entropy(labelled_logits, labels) + unlabelled_weight * unlabelled, kept


@float32
def pseudo_label_loss(
    probabilities_UC: Tensor, strong_logits_UC: Tensor, *, threshold: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the strong views on the classes that are probable enough; and which images are kept, (U,) bool.

    Shapes: both (U, C), row i of both from image i. threshold: a number or a scalar; or (C,), of which the entry of the
    guessed class counts.

        kept[i] = max_c probabilities[i] >= threshold
        loss = mean over *all* U of  kept[i] * CE(strong[i], argmax_c probabilities[i])

    Only the strong views receive a gradient. FixMatch, FlexMatch and AdaMatch differ in probabilities and threshold.
    """
    _check_same_shape("pseudo_label_loss", probabilities=probabilities_UC, strong_logits=strong_logits_UC)
    confidence_U, guesses_U = probabilities_UC.detach().max(dim=1)
    if isinstance(threshold, Tensor) and threshold.ndim:
        threshold = threshold[guesses_U]
    kept_U = confidence_U >= threshold
    return weighted_cross_entropy(strong_logits_UC, guesses_U, kept_U), kept_U


@float32
def weighted_cross_entropy(logits_NC: Tensor, targets: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """The mean over *all* N rows of weight * cross-entropy with the target; without weights they are 1.

    Shapes: logits (N, C); targets classes (N,) int64 or probabilities (N, C); weights (N,), numbers or bool. Only the
    logits receive a gradient. The mean over processes is that of the global batch, as long as all bring the same N.
    """
    num_rows = len(logits_NC)
    shapes = {(num_rows,), tuple(logits_NC.shape)}
    fits = num_rows > 0 and tuple(targets.shape) in shapes and (weights_N is None or weights_N.shape == (num_rows,))
    if logits_NC.ndim != 2 or not fits:
        weights = "no weights" if weights_N is None else f"weights {tuple(weights_N.shape)}"
        raise ValueError(
            "weighted_cross_entropy needs logits (N, C), targets (N,) or (N, C) and weights (N,), N >= 1. "
            f"Got {tuple(logits_NC.shape)}, {tuple(targets.shape)} and {weights}."
        )
    if weights_N is None:
        return F.cross_entropy(logits_NC, targets.detach())
    return (F.cross_entropy(logits_NC, targets.detach(), reduction="none") * weights_N.detach()).mean()


@float32
def consistency_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distance: Literal["mse", "kl"] = "mse"
) -> Tensor:
    """How far the student's class probabilities are from the teacher's, which receive no gradient (Mean Teacher).

    Shapes: both (N, C), row i of both from image i; labelled images count too.

        mse:  mean over rows and classes of (softmax(student) - softmax(teacher))^2
        kl:   mean over rows of KL(softmax(teacher) || softmax(student))
    """
    _check_same_shape("consistency_loss", student_logits=student_logits, teacher_logits=teacher_logits)
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
    _check_same_shape("probability_error", logits=logits_NC, targets=targets_NC)
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
    _check_same_shape("mixmatch_loss", labelled_logits=labelled_logits, labelled_targets=labelled_targets)
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
    _check_same_shape("pi_model_loss", first_logits=first_logits, second_logits=second_logits)
    distance = F.mse_loss(F.softmax(first_logits, dim=1), F.softmax(second_logits, dim=1))
    return labelled_cross_entropy(first_logits, labels) + consistency_weight * distance


@float32
def uda_loss(
    weak_logits: Tensor, strong_logits: Tensor, *, threshold: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """UDA's unlabelled term, and which images are kept, (U,) bool (Xie et al., 2019, https://arxiv.org/abs/1904.12848).

    Shapes: both (U, C), row i of both from image i.

        kept[i] = max_c softmax(weak[i])[c] > threshold
        loss = mean over *all* U of  kept[i] * KL(softmax(weak[i] / temperature) || softmax(strong[i]))

    Only the strong views receive a gradient.
    """
    _check_same_shape("uda_loss", weak_logits=weak_logits, strong_logits=strong_logits)
    check_positive("uda_loss", temperature=temperature)
    weak_logits = weak_logits.detach()
    kept_U = F.softmax(weak_logits, dim=1).amax(dim=1) > threshold
    sharp_UC = F.log_softmax(weak_logits / temperature, dim=1)
    divergence_U = (sharp_UC.exp() * (sharp_UC - F.log_softmax(strong_logits, dim=1))).sum(dim=1)
    return (divergence_U * kept_U).mean(), kept_U


@float32
def annealed_cross_entropy(logits_BC: Tensor, labels_B: Tensor, *, limit: float) -> Tensor:
    """UDA's training-signal annealing: labelled rows that are known too well for now drop out.

    Shapes: logits (B, C), labels (B,) int64.

        kept[i] = softmax(logits[i])[labels[i]] <= limit
        loss = sum of kept[i] * CE(logits[i], labels[i]) / max(number of kept rows, 1),  both over all processes
    """
    if logits_BC.ndim != 2 or len(logits_BC) == 0 or labels_B.shape != logits_BC.shape[:1]:
        raise ValueError(
            "annealed_cross_entropy needs logits (B, C) and labels (B,), B >= 1. "
            f"Got {tuple(logits_BC.shape)} and {tuple(labels_B.shape)}."
        )
    losses_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
    kept_B = (-losses_B.detach()).exp() <= limit
    kept_per_process = mean_over_ranks(kept_B.to(losses_B.dtype).sum())
    return (losses_B * kept_B).sum() / kept_per_process.clamp(min=1 / world_size())


@float32
def fairness_loss(strong_logits_UC: Tensor, kept_U: Tensor, predictions_C: Tensor, guesses_C: Tensor) -> Tensor:
    """FreeMatch's fairness term: strong views predict the classes as often as weak ones did until now (Wang et al.,
    2022, https://arxiv.org/abs/2205.07246, equation 11).

    Shapes: strong_logits (U, C), kept (U,) bool; predictions and guesses (C,), moving means of the weak views'
    probabilities and of their argmax. With q the sum of the strong views' probabilities and k how often each class is
    their argmax, both of the kept rows of all processes, and norm dividing by the sum, x / 0 := 0:

        sum_c a_c log(b_c + 1e-12),  a = norm(predictions / guesses),  b = norm(q / k)

    Only q receives a gradient, exact on several processes. With nothing kept it is 0.
    """
    if {predictions_C.shape, guesses_C.shape} != {strong_logits_UC.shape[1:]} or kept_U.shape != strong_logits_UC.shape[
        :1
    ]:
        raise ValueError(
            "fairness_loss needs strong logits (U, C), kept (U,), predictions and guesses (C,). "
            f"Got {tuple(strong_logits_UC.shape)}, {tuple(kept_U.shape)}, {tuple(predictions_C.shape)} and "
            f"{tuple(guesses_C.shape)}."
        )
    kept_U1 = kept_U.detach().to(strong_logits_UC.dtype)[:, None]
    strong_UC = F.softmax(strong_logits_UC, dim=1)
    guessed_UC = torch.zeros_like(strong_UC).scatter_(1, strong_logits_UC.argmax(dim=1, keepdim=True), 1)
    counts_C = gather((guessed_UC * kept_U1).sum(dim=0)[None]).sum(dim=0)
    sums_C = gather_with_grad((strong_UC * kept_U1).sum(dim=0)[None]).sum(dim=0)
    shares_C = _normalised(_quotient(sums_C, counts_C))
    wanted_C = _normalised(_quotient(predictions_C.detach(), guesses_C.detach()))
    return (wanted_C * (shares_C + 1e-12).log()).sum() * (counts_C.sum() > 0)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where that is 0."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1), 0)


def _normalised(values: Tensor) -> Tensor:
    total = values.sum()
    return values / torch.where(total > 0, total, 1)


@float32
def sharpen(probabilities: Tensor, *, temperature: float) -> Tensor:
    """p^(1 / temperature) over the last axis, renormalised (MixMatch, equation 7)."""
    check_positive("sharpen", temperature=temperature)
    # over the largest first: else small ones to a high power are all 0
    powers = (probabilities / probabilities.amax(dim=-1, keepdim=True)).pow(1 / temperature)
    return powers / powers.sum(dim=-1, keepdim=True)


@float32
@torch.no_grad()
def guess_labels(logits_VUC: Tensor, *, temperature: float) -> Tensor:
    """MixMatch's targets (U, C): the mean over V views of the class probabilities, then sharpened; no gradient."""
    if logits_VUC.ndim != 3 or len(logits_VUC) == 0:
        raise ValueError(f"guess_labels needs logits (V, U, C), V >= 1. Got {tuple(logits_VUC.shape)}.")
    return sharpen(F.softmax(logits_VUC, dim=-1).mean(dim=0), temperature=temperature)


@float32
def align_distribution(probabilities_UC: Tensor, target_C: Tensor, model_C: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Probabilities whose mean is moved from the model's towards the target's (ReMixMatch, section 3.1).

        p * (target + eps) / (model + eps), rows renormalised

    Shapes: probabilities (U, C); target and model (C,), distributions over classes.
    """
    if {target_C.shape, model_C.shape} != {probabilities_UC.shape[-1:]}:
        raise ValueError(
            "align_distribution needs probabilities (U, C), target and model (C,). "
            f"Got {tuple(probabilities_UC.shape)}, {tuple(target_C.shape)} and {tuple(model_C.shape)}."
        )
    aligned_UC = probabilities_UC * ((target_C + eps) / (model_C + eps))
    return aligned_UC / aligned_UC.sum(dim=-1, keepdim=True)


@float32
@torch.no_grad()
def relative_threshold(labelled_probabilities_BC: Tensor, *, share: float) -> Tensor:
    """AdaMatch's threshold: share * the mean largest probability of the labelled rows of all processes; no gradient."""
    if labelled_probabilities_BC.ndim != 2 or len(labelled_probabilities_BC) == 0:
        raise ValueError(
            f"relative_threshold needs probabilities (B, C), B >= 1. Got {tuple(labelled_probabilities_BC.shape)}."
        )
    return share * mean_over_ranks(labelled_probabilities_BC.amax(dim=1).mean())


@float32
def interpolate_logits(joint: Tensor, alone: Tensor, draws: Tensor) -> Tensor:
    """AdaMatch's labelled logits, at random between those of the joint batch and those of the labelled images alone.

    Shapes: all the same, draws uniform in [0, 1):  joint + draws * (alone - joint)
    """
    _check_same_shape("interpolate_logits", joint=joint, alone=alone, draws=draws)
    return joint + draws * (alone - joint)


def _check_same_shape(where: str, **tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] == 0:
        raise ValueError(
            f"{where} needs {', '.join(tensors)} of one shape (N, C), N >= 1. Got {', '.join(map(str, shapes))}."
        )
