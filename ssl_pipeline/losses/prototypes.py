"""Cross-entropy over prototypes whose logits are never whole: computed in slabs of prototypes, used and forgotten,
forward and backward.

It is what DINO (Caron et al., 2021, https://arxiv.org/abs/2104.14294), iBOT (Zhou et al., 2021,
https://arxiv.org/abs/2111.07832), DINOv2, DINOv3 and SwAV have in common: rows predict target rows. The methods differ
in how targets are made (`centred_targets`, `sinkhorn_targets`), in which row predicts which (`mix_ST`), and in what a
row counts (`weights_N`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.losses.checks import check_positive
from ssl_pipeline.losses.distillation import check_crops
from ssl_pipeline.losses.precision import float32, matmul_dtype, sum_dtype
from ssl_pipeline.losses.prototype_targets import SLAB, PrototypeTargets, slabs_of

# Axes: S crops of the student and T of the teacher of each of B images; N = S * B and M = T * B rows, crop by crop;
# D dimensions, K prototypes, k those of one slab.
# With many rows a slab is narrower: 2,000 rows on one core take 600 ms in slabs of 2**20 logits, 1,470 in 2**24.
CPU_LOGITS, GPU_LOGITS = 2**21, 2**26


def crop_pairs(
    student_ND: Tensor, teacher_MD: Tensor, *, num_images: int, leave_out_same_crop: bool = True
) -> tuple[Tensor, Tensor]:
    """`weights_N` and `mix_ST` with which `prototype_cross_entropy` is `self_distillation`: the mean over all pairs.

    Shapes: rows crop by crop, N = S * B and M = T * B of B images; the first T crops of the student are the teacher's,
    unless same crops count too. Raises ValueError as `self_distillation`, or if the rows are not those of whole crops.
    """
    if num_images < 1 or len(student_ND) % num_images or len(teacher_MD) % num_images:
        raise ValueError(
            f"crop_pairs needs rows of each of num_images={num_images} images. "
            f"Got {len(student_ND)} and {len(teacher_MD)}."
        )
    student_SBD, teacher_TBD = (rows.unflatten(0, (-1, num_images)) for rows in (student_ND, teacher_MD))
    check_crops(student_SBD, teacher_TBD, leave_out_same_crop=leave_out_same_crop)
    num_student, num_teacher = len(student_SBD), len(teacher_TBD)
    pairs_ST = student_ND.new_ones(num_student, num_teacher, dtype=sum_dtype(student_ND))
    if leave_out_same_crop:
        pairs_ST.fill_diagonal_(0)
    num_pairs = num_student * num_teacher - leave_out_same_crop * num_teacher
    partners_S1 = pairs_ST.sum(dim=1, keepdim=True)
    weights_N = (partners_S1 / (num_pairs * num_images)).expand(-1, num_images).flatten()
    return weights_N, pairs_ST / partners_S1.clamp(min=1)


def prototype_cross_entropy(
    rows_ND: Tensor,
    prototypes_KD: Tensor,
    targets: PrototypeTargets | Tensor,
    weights_N: Tensor,
    *,
    temperature: float,
    mix_ST: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over rows of their cross-entropy with target rows; and the mean entropy of the target rows.

    Shapes: rows (N, D), prototypes (K, D), weights (N,); targets are M rows over the K prototypes that sum to 1, as
    `PrototypeTargets` or as a tensor (M, K). Without `mix_ST` row n predicts target n. With it (S, T) the rows are S
    crops and the targets T crops of the same B images, crop by crop, and row (s, b) predicts the sum over t of
    mix[s, t] * target[t, b]; rows of the mix sum to 1 (or to 0, for a row of weight 0):

        sum over n of  weights[n] * -sum_k target[n,k] * log softmax(rows[n] @ prototypes.T / temperature)[k]

    Only rows and prototypes receive a gradient. Several processes: each the sum over its own rows; weights 1 / N give
    the mean. Under autocast the products are computed in its dtype, as those of a linear layer; all else is float32.
    Raises ValueError for shapes that do not fit, or unless temperature > 0.
    """
    check_positive("prototype_cross_entropy", temperature=temperature)
    num_targets, num_columns = _shape(targets)
    num_student, num_teacher = (1, 1) if mix_ST is None else mix_ST.shape
    fits = (num_columns, len(weights_N)) == (len(prototypes_KD), len(rows_ND)) and len(rows_ND) % num_student == 0
    if not fits or num_targets != len(rows_ND) // num_student * num_teacher:
        raise ValueError(
            "prototype_cross_entropy needs rows (N, D), prototypes (K, D), targets (M, K) and weights (N,): N rows of "
            f"S crops and M of T crops of the same images. Got N={len(rows_ND)}, K={len(prototypes_KD)}, targets "
            f"{(num_targets, num_columns)}, weights {tuple(weights_N.shape)}, S={num_student}, T={num_teacher}."
        )
    to, wide = matmul_dtype(rows_ND), sum_dtype(rows_ND)
    passes = _Given(targets.detach().to(wide)) if isinstance(targets, Tensor) else _Computed(targets.detached(to), wide)
    if mix_ST is None:
        mix_ST = rows_ND.new_ones(1, 1, dtype=wide)
    with torch.autocast(rows_ND.device.type, enabled=False):
        return _PrototypeCrossEntropy.apply(
            rows_ND.to(to), prototypes_KD.to(to), weights_N.detach().to(wide), mix_ST.to(wide), passes, temperature
        )


@float32
def total_logits(rows: Tensor, prototypes_KD: Tensor) -> Tensor:
    """(..., D) -> (K,): the sum of the rows' products with the prototypes, which is the product of their sum."""
    return prototypes_KD @ rows.flatten(0, -2).sum(dim=0)


class _Computed:
    """The slabs of `PrototypeTargets`: the first pass finds each row's softmax total on the way, the second has it."""

    def __init__(self, targets: PrototypeTargets, wide: torch.dtype) -> None:
        self.targets = targets
        num_rows = targets.rows.shape[0]
        self.total_M = targets.shifts.new_full((num_rows,), -torch.inf)
        self.mean_M = torch.zeros_like(self.total_M)  # of each row's logit under its own probabilities

    def first(self, slab: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities (M, k) within the slab, and what those of the slabs before and of this one count together."""
        logits_Mk = self.targets.logits(slab)
        slab_total_M = logits_Mk.logsumexp(dim=1)
        probabilities_Mk = (logits_Mk - slab_total_M[:, None]).exp_()
        before_M, self.total_M = self.total_M, torch.logaddexp(self.total_M, slab_total_M)
        old_M, new_M = (before_M - self.total_M).exp_(), (slab_total_M - self.total_M).exp_()
        self.mean_M = self.mean_M * old_M + torch.linalg.vecdot(probabilities_Mk, logits_Mk) * new_M
        return probabilities_Mk, old_M, new_M

    def again(self, slab: slice) -> Tensor:
        """The probabilities (M, k), once `first` has seen every slab."""
        return self.targets.logits(slab).sub_(self.total_M[:, None]).exp_()

    def entropy(self) -> Tensor:
        """The mean over rows."""
        return (self.total_M - self.mean_M).sum() / max(len(self.total_M), 1)


class _Given:
    """The same slabs of targets (M, K) that are there already."""

    def __init__(self, targets_MK: Tensor) -> None:
        self.targets_MK = targets_MK
        self.one_M = targets_MK.new_ones(targets_MK.shape[0])

    def first(self, slab: slice) -> tuple[Tensor, Tensor, Tensor]:
        return self.targets_MK[:, slab], self.one_M, self.one_M

    def again(self, slab: slice) -> Tensor:
        return self.targets_MK[:, slab]

    def entropy(self) -> Tensor:
        return -torch.special.xlogy(self.targets_MK, self.targets_MK).sum() / max(len(self.targets_MK), 1)


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Rows and targets against one slab of prototypes after the other.

    Forward keeps the logarithm of each row's softmax total; backward computes a slab's logits again and with the totals
    the probabilities.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        rows_ND: Tensor,
        prototypes_KD: Tensor,
        weights_N: Tensor,
        mix_ST: Tensor,
        targets: _Computed | _Given,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        num_student, num_teacher = mix_ST.shape
        total_N = torch.full_like(weights_N, -torch.inf)
        agreement_BST = weights_N.new_zeros(len(rows_ND) // num_student, num_student, num_teacher)
        for slab in slabs_of(len(prototypes_KD), _width(rows_ND)):
            targets_Mk, old_M, new_M = targets.first(slab)
            logits_Nk = _logits(rows_ND, prototypes_KD, slab, temperature)
            total_N = torch.logaddexp(total_N, logits_Nk.logsumexp(dim=1))
            # the mean logit of row (s, b) under target (t, b), so far
            logits_BSk = logits_Nk.unflatten(0, (num_student, -1)).transpose(0, 1)
            targets_BkT = targets_Mk.unflatten(0, (num_teacher, -1)).permute(1, 2, 0)
            old_BT, new_BT = (share_M.unflatten(0, (num_teacher, -1)).T for share_M in (old_M, new_M))
            agreement_BST = agreement_BST * old_BT[:, None] + (logits_BSk @ targets_BkT) * new_BT[:, None]
        ctx.save_for_backward(rows_ND, prototypes_KD, weights_N, mix_ST, total_N)
        ctx.targets, ctx.temperature = targets, temperature  # type: ignore[attr-defined]
        entropy = targets.entropy()
        ctx.mark_non_differentiable(entropy)
        # a row's cross-entropy is its total less its mean logit under its target
        agreement_N = torch.einsum("bst,st->sb", agreement_BST, mix_ST).flatten()
        return weights_N @ (total_N - agreement_N), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        rows_ND, prototypes_KD, weights_N, mix_ST, total_N = ctx.saved_tensors  # type: ignore[attr-defined]
        targets: _Computed | _Given = ctx.targets  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        num_student, num_teacher = mix_ST.shape
        scale_N1 = (weights_N * (gradient / -temperature))[:, None]
        scaled_ND = (rows_ND * scale_N1).to(rows_ND.dtype)
        gradient_ND = torch.zeros_like(rows_ND, dtype=total_N.dtype)
        gradient_KD = torch.empty_like(prototypes_KD)
        with torch.autocast(gradient.device.type, enabled=False):
            for slab in slabs_of(len(prototypes_KD), _width(rows_ND)):
                targets_Mk = targets.again(slab)
                probabilities_Nk = _logits(rows_ND, prototypes_KD, slab, temperature).sub_(total_N[:, None]).exp_()
                # -d loss / d logits: the mixed target less the own softmax
                probabilities_Nk.view(num_student, -1).addmm_(mix_ST, targets_Mk.reshape(num_teacher, -1), beta=-1)
                slope_Nk = probabilities_Nk.to(rows_ND.dtype)
                gradient_ND += slope_Nk @ prototypes_KD[slab]
                torch.mm(slope_Nk.T, scaled_ND, out=gradient_KD[slab])
        return gradient_ND.mul_(scale_N1).to(rows_ND.dtype), gradient_KD, None, None, None, None


def _shape(targets: PrototypeTargets | Tensor) -> tuple[int, int]:
    """(M, K)."""
    if isinstance(targets, Tensor):
        return targets.shape[0], targets.shape[1]
    return targets.rows.shape[0], targets.prototypes.shape[0]


def _width(rows_ND: Tensor) -> int:
    """Prototypes in a slab for these rows."""
    num_logits = CPU_LOGITS if rows_ND.device.type == "cpu" else GPU_LOGITS
    return max(1, min(SLAB, num_logits // max(len(rows_ND), 1)))


def _logits(rows_ND: Tensor, prototypes_KD: Tensor, slab: slice, temperature: float) -> Tensor:
    """(N, k), a tensor of its own."""
    return (rows_ND @ prototypes_KD[slab].T).to(sum_dtype(rows_ND)).mul_(1 / temperature)
