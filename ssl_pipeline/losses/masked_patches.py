"""The loss of masked patches (iBOT, Zhou et al., 2021, https://arxiv.org/abs/2111.07832; DINOv2, DINOv3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.losses.checks import check_positive
from ssl_pipeline.losses.precision import float32

# Axes: N image crops, L patches of each, M masked patches of all, K prototypes.


@float32
def masked_patch_loss(student_MK: Tensor, teacher_MK: Tensor, mask_NL: Tensor, *, temperature: float) -> Tensor:
    """Mean cross-entropy of the masked patches of an image, averaged over all images; 0 for one without a mask.

    Shapes: `student_MK` logits and `teacher_MK` probabilities of the M patches where `mask_NL` (bool) is True, image by
    image in the order of `mask.flatten().nonzero()`; the teacher receives no gradient. With c_n masked patches of n:

        1 / N * sum over n with c_n > 0 of  1 / c_n * sum over its patches of
            -sum_k teacher[m,k] * log softmax(student[m] / temperature)[k]

    Processes may bring different M, but the same N. Raises ValueError for shapes that do not fit, or unless
    temperature > 0. For many prototypes: `prototype_cross_entropy` with the weights of `masked_patch_weights`.
    """
    check_positive("masked_patch_loss", temperature=temperature)
    num_masked = int(mask_NL.sum())
    fits = mask_NL.ndim == 2 and mask_NL.dtype == torch.bool and student_MK.ndim == 2
    if not fits or student_MK.shape != teacher_MK.shape or len(student_MK) != num_masked:
        raise ValueError(
            "masked_patch_loss needs student and teacher (M, K) for the M patches of a bool mask (N, L). Got "
            f"{tuple(student_MK.shape)} and {tuple(teacher_MK.shape)} for {num_masked} of {tuple(mask_NL.shape)} "
            f"{mask_NL.dtype}."
        )
    log_student_MK = F.log_softmax(student_MK / temperature, dim=-1)
    per_patch_M = -torch.linalg.vecdot(teacher_MK.detach().to(log_student_MK.dtype), log_student_MK)
    return masked_patch_weights(mask_NL, num_masked, dtype=per_patch_M.dtype) @ per_patch_M


def masked_patch_weights(mask_NL: Tensor, num_masked: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(M,): what each of the `num_masked` True patches of a mask counts in `masked_patch_loss`, image by image.

    1 / (masked patches of its image * N). The host knows M from the rows that it has; nothing waits for the device.
    """
    counts_N = mask_NL.sum(dim=1)
    image_M = torch.searchsorted(counts_N.cumsum(0), torch.arange(num_masked, device=mask_NL.device), right=True)
    return 1 / (counts_N.clamp(min=1).to(dtype) * len(mask_NL))[image_M]
