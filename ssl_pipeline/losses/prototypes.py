"""DINO's loss from the bottleneck on (Caron et al., 2021, https://arxiv.org/abs/2104.14294): the logits of the
prototypes are computed in slabs, used and forgotten, forward and backward, and so never stored whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.losses.distillation import check_crops
from ssl_pipeline.losses.precision import float32, matmul_dtype, sum_dtype

# Axes: S student crops of which the first T are the teacher's, B images, K prototypes, k those of one slab,
# D dimensions of the bottleneck; N = S * B and M = T * B rows.
SLAB = 8192  # 160 rows on one core: 2,048 to 16,384 prototypes are alike, 65,536 (all at once) take 1.5x the time


def prototype_distillation(
    student_SBD: Tensor,
    prototypes_KD: Tensor,
    teacher_TBD: Tensor,
    teacher_prototypes_KD: Tensor,
    centre_K: Tensor,
    *,
    temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    """`self_distillation` of logits that are products with prototypes; and the mean entropy of the teacher.

    Shapes: bottlenecks (S, B, D) and (T, B, D) of the same B images, the teacher's crops the first of the student's;
    the prototypes of each as rows (K, D); centre (K,). Only the student's bottleneck and prototypes receive a gradient.
    The value is

        self_distillation(student @ prototypes.T, centred_softmax(teacher @ teacher_prototypes.T, centre, ...), ...)

    Under autocast the products are computed in its dtype, as those of a linear layer; all else is float32.
    Raises ValueError as `self_distillation`.
    """
    check_crops(student_SBD, teacher_TBD)
    to = matmul_dtype(student_SBD)
    wide = sum_dtype(student_SBD)
    with torch.autocast(student_SBD.device.type, enabled=False):
        return _PrototypeDistillation.apply(
            student_SBD.to(to),
            prototypes_KD.to(to),
            teacher_TBD.detach().to(to),
            teacher_prototypes_KD.detach().to(to),
            -centre_K.detach().to(wide) / teacher_temperature,
            temperature,
            teacher_temperature,
        )


@float32
def mean_logits(bottleneck: Tensor, prototypes_KD: Tensor) -> Tensor:
    """(..., D) -> (K,): the mean of the rows' products with the prototypes, which is the product of their mean."""
    return prototypes_KD @ bottleneck.flatten(0, -2).mean(dim=0)


class _PrototypeDistillation(torch.autograd.Function):
    """The rows of student and teacher against one slab of prototypes after the other.

    Forward keeps the logarithm of each row's softmax total; backward computes a slab's logits again and with the totals
    the probabilities. `shift_K` is what the teacher's logits are moved by, in units of its temperature.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        student_SBD: Tensor,
        prototypes_KD: Tensor,
        teacher_TBD: Tensor,
        teacher_prototypes_KD: Tensor,
        shift_K: Tensor,
        temperature: float,
        teacher_temperature: float,
    ) -> tuple[Tensor, Tensor]:
        num_student, num_teacher = student_SBD.shape[0], teacher_TBD.shape[0]
        student_ND, teacher_MD = student_SBD.flatten(0, 1), teacher_TBD.flatten(0, 1)
        total_N = shift_K.new_full((student_ND.shape[0],), -torch.inf)
        total_M = shift_K.new_full((teacher_MD.shape[0],), -torch.inf)
        mean_M = torch.zeros_like(total_M)  # of the teacher's logit under its own probabilities
        agreement_BST = shift_K.new_zeros(student_SBD.shape[1], num_student, num_teacher)  # of the student's logits
        for slab in _slabs(prototypes_KD):
            teacher_Mk = _teacher_logits(teacher_MD, teacher_prototypes_KD, shift_K, slab, teacher_temperature)
            slab_total_M = teacher_Mk.logsumexp(dim=1)
            probabilities_Mk = (teacher_Mk - slab_total_M[:, None]).exp_()  # within the slab
            before_M, total_M = total_M, torch.logaddexp(total_M, slab_total_M)
            old_M, new_M = (before_M - total_M).exp_(), (slab_total_M - total_M).exp_()
            mean_M = mean_M * old_M + torch.linalg.vecdot(probabilities_Mk, teacher_Mk) * new_M
            student_Nk = _student_logits(student_ND, prototypes_KD, slab, temperature)
            total_N = torch.logaddexp(total_N, student_Nk.logsumexp(dim=1))
            student_BSk = student_Nk.unflatten(0, (num_student, -1)).transpose(0, 1)
            old_BT, new_BT = (share_M.unflatten(0, (num_teacher, -1)).T for share_M in (old_M, new_M))
            probabilities_BkT = probabilities_Mk.unflatten(0, (num_teacher, -1)).permute(1, 2, 0)
            agreement_BST = agreement_BST * old_BT[:, None] + (student_BSk @ probabilities_BkT) * new_BT[:, None]
        ctx.save_for_backward(student_SBD, prototypes_KD, teacher_TBD, teacher_prototypes_KD, shift_K, total_N, total_M)
        ctx.temperature, ctx.teacher_temperature = temperature, teacher_temperature  # type: ignore[attr-defined]
        # each pair's cross-entropy is the student's total less its mean logit under the teacher
        cross_entropy_BST = total_N.unflatten(0, (num_student, -1)).T[:, :, None] - agreement_BST
        same_crop = cross_entropy_BST.diagonal(dim1=1, dim2=2).sum()
        entropy = (total_M - mean_M).mean()
        ctx.mark_non_differentiable(entropy)
        return (cross_entropy_BST.sum() - same_crop) / _num_pairs(student_SBD, teacher_TBD), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        student_SBD, prototypes_KD, teacher_TBD, teacher_prototypes_KD, shift_K, total_N, total_M = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        teacher_temperature: float = ctx.teacher_temperature  # type: ignore[attr-defined]
        num_student, num_teacher = student_SBD.shape[0], teacher_TBD.shape[0]
        student_ND, teacher_MD = student_SBD.flatten(0, 1), teacher_TBD.flatten(0, 1)
        scale = gradient / (-temperature * _num_pairs(student_SBD, teacher_TBD))
        scaled_ND = (student_ND * scale).to(student_ND.dtype)
        gradient_ND = torch.zeros_like(student_ND, dtype=shift_K.dtype)
        gradient_KD = torch.empty_like(prototypes_KD)
        with torch.autocast(gradient.device.type, enabled=False):
            for slab in _slabs(prototypes_KD):
                teacher_Mk = _teacher_logits(teacher_MD, teacher_prototypes_KD, shift_K, slab, teacher_temperature)
                teacher_TBk = teacher_Mk.sub_(total_M[:, None]).exp_().unflatten(0, (num_teacher, -1))
                student_Nk = _student_logits(student_ND, prototypes_KD, slab, temperature)
                student_SBk = student_Nk.sub_(total_N[:, None]).exp_().unflatten(0, (num_student, -1))
                # -d loss / d logits, per pair: the other crops' teachers less as often the own softmax
                teachers_Bk = teacher_TBk.sum(dim=0)
                student_SBk[:num_teacher].mul_(1 - num_teacher).add_(teachers_Bk).sub_(teacher_TBk)
                others_SBk = student_SBk[num_teacher:]
                torch.sub(teachers_Bk, others_SBk, alpha=num_teacher, out=others_SBk)
                slope_Nk = student_Nk.to(student_ND.dtype)
                gradient_ND += slope_Nk @ prototypes_KD[slab]
                torch.mm(slope_Nk.T, scaled_ND, out=gradient_KD[slab])
            gradient_SBD = gradient_ND.mul_(scale).to(student_SBD.dtype).view_as(student_SBD)
        return gradient_SBD, gradient_KD, None, None, None, None, None


def _slabs(prototypes_KD: Tensor) -> list[slice]:
    num_prototypes = prototypes_KD.shape[0]
    return [slice(start, min(start + SLAB, num_prototypes)) for start in range(0, num_prototypes, SLAB)]


def _student_logits(rows_ND: Tensor, prototypes_KD: Tensor, slab: slice, temperature: float) -> Tensor:
    """(N, k), a tensor of its own."""
    return (rows_ND @ prototypes_KD[slab].T).to(sum_dtype(rows_ND)).mul_(1 / temperature)


def _teacher_logits(rows_MD: Tensor, prototypes_KD: Tensor, shift_K: Tensor, slab: slice, temperature: float) -> Tensor:
    """(M, k), a tensor of its own."""
    return torch.add(shift_K[slab], rows_MD @ prototypes_KD[slab].T, alpha=1 / temperature)


def _num_pairs(student_SBD: Tensor, teacher_TBD: Tensor) -> int:
    """Of a student crop with a teacher crop of the same image, the same crop left out."""
    return teacher_TBD.shape[0] * (student_SBD.shape[0] - 1) * student_SBD.shape[1]
