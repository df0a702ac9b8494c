"""Cross-entropy over prototypes in slabs of them, forward and backward, so that many logits are never whole.

A slab is computed, used and forgotten; on CPUs backward finds what forward computed, where all of it is little.

It is what DINO (Caron et al., 2021, https://arxiv.org/abs/2104.14294), iBOT (Zhou et al., 2021,
https://arxiv.org/abs/2111.07832), DINOv2, DINOv3 and SwAV have in common: rows predict target rows. The methods differ
in how targets are made (`centred_targets`, `sinkhorn_targets`), in which row predicts which (`mix_ST`), and in what a
row counts (`weights_N`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
CPU_KEPT = 2**26  # logits of rows and targets, in float32 256 MiB, that backward finds; GPUs lack memory, not speed


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
    shapes = _shapes(rows_ND, prototypes_KD, targets, weights_N, mix_ST)
    if not _fit_together(*shapes):
        raise ValueError(
            "prototype_cross_entropy needs rows (N, D), prototypes (K, D), targets (M, K), weights (N,), mix (S, T): N "
            "rows of S crops and M of T crops of the same images. Got rows {}, prototypes {}, targets {}, weights {}, "
            "mix {}.".format(*shapes)
        )
    num_targets, num_columns = shapes[2]
    to, wide = matmul_dtype(rows_ND), sum_dtype(rows_ND)
    num_logits = (len(rows_ND) + (0 if isinstance(targets, Tensor) else num_targets)) * num_columns
    keep = num_logits <= CPU_KEPT and rows_ND.device.type == "cpu" and torch.is_grad_enabled()
    passes: _Given | _Computed
    if isinstance(targets, Tensor):
        passes = _Given(targets.detach().to(wide))
    else:
        passes = _Computed(targets.detached(to), keep=keep)
    if mix_ST is None:
        mix_ST = rows_ND.new_ones(1, 1, dtype=wide)
    with torch.autocast(rows_ND.device.type, enabled=False):
        return _PrototypeCrossEntropy.apply(
            rows_ND.to(to),
            prototypes_KD.to(to),
            weights_N.detach().to(wide),
            mix_ST.to(wide),
            passes,
            temperature,
            keep,
        )


@float32
def total_logits(rows: Tensor, prototypes_KD: Tensor) -> Tensor:
    """(..., D) -> (K,): the sum of the rows' products with the prototypes, which is the product of their sum."""
    return prototypes_KD @ rows.flatten(0, -2).sum(dim=0)


class _Softmax:
    """The totals of rows whose logits come slab by slab.

    keep: whether `kept` gets what `add` finds of each slab, for `_probabilities`.
    """

    def __init__(self, num_rows: int, like: Tensor, *, keep: bool) -> None:
        self.total_N = like.new_full((num_rows,), -torch.inf)  # logarithm of the sum of all exponentials so far
        self.keep, self.kept = keep, list[Tensor]()

    def add(self, logits_Nk: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax (N, k) within this slab, and the logarithm of its total (N,)."""
        within_Nk = logits_Nk.softmax(dim=1)
        # the likeliest has the largest logit, and is its exponential over the total
        slab_total_N = logits_Nk.amax(dim=1) - within_Nk.amax(dim=1).log_()
        self.total_N = torch.logaddexp(self.total_N, slab_total_N)
        if self.keep:
            self.kept += within_Nk, slab_total_N
        return within_Nk, slab_total_N

    def take_kept(self) -> list[Tensor]:
        """Two tensors of each slab, or none at all; nothing of it stays here."""
        kept, self.kept = self.kept, []
        return kept


def _probabilities(
    logits_of: Callable[[slice], Tensor], slab: slice, total_N: Tensor, kept: Sequence[Tensor]
) -> Tensor:
    """Softmax over all prototypes (N, k), newly allocated: of what was kept of the slab, or else of its logits."""
    if kept:
        within_Nk, slab_total_N = kept
        return within_Nk * (slab_total_N - total_N).exp_()[:, None]
    return logits_of(slab).sub_(total_N[:, None]).exp_()


class _Computed:
    """The slabs of `PrototypeTargets`: the first pass finds each row's softmax total on the way, the second has it."""

    def __init__(self, targets: PrototypeTargets, *, keep: bool) -> None:
        self.targets = targets
        num_rows = targets.rows.shape[0]
        self.softmax = _Softmax(num_rows, targets.shifts, keep=keep)
        self.mean_M = targets.shifts.new_zeros(num_rows)  # of each row's logit under its own probabilities

    def first(self, slab: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities (M, k) within the slab, and what those of the slabs before and of this one count together."""
        logits_Mk, before_M = self.targets.logits(slab), self.softmax.total_N
        within_Mk, slab_total_M = self.softmax.add(logits_Mk)
        old_M, new_M = (before_M - self.softmax.total_N).exp_(), (slab_total_M - self.softmax.total_N).exp_()
        self.mean_M = self.mean_M * old_M + torch.linalg.vecdot(within_Mk, logits_Mk) * new_M
        return within_Mk, old_M, new_M

    def take_kept(self) -> list[Tensor]:
        return self.softmax.take_kept()

    def again(self, slab: slice, kept: Sequence[Tensor]) -> Tensor:
        """The probabilities (M, k), once `first` has seen every slab; kept: of this slab."""
        return _probabilities(self.targets.logits, slab, self.softmax.total_N, kept)

    def entropy(self) -> Tensor:
        """The mean over rows."""
        return (self.softmax.total_N - self.mean_M).sum() / max(len(self.mean_M), 1)


class _Given:
    """The same slabs of targets (M, K) that are there already."""

    def __init__(self, targets_MK: Tensor) -> None:
        self.targets_MK = targets_MK
        self.one_M = targets_MK.new_ones(targets_MK.shape[0])

    def first(self, slab: slice) -> tuple[Tensor, Tensor, Tensor]:
        return self.targets_MK[:, slab], self.one_M, self.one_M

    def take_kept(self) -> list[Tensor]:
        return []

    def again(self, slab: slice, kept: Sequence[Tensor]) -> Tensor:
        return self.targets_MK[:, slab]

    def entropy(self) -> Tensor:
        return -torch.special.xlogy(self.targets_MK, self.targets_MK).sum() / max(len(self.targets_MK), 1)


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Rows and targets against one slab of prototypes after the other.

    Forward finds the logarithm of each row's softmax total; backward has a slab's softmax, or its logits once more, and
    with the totals the probabilities.
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
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        num_student, num_teacher = mix_ST.shape
        softmax = _Softmax(len(rows_ND), weights_N, keep=keep)
        agreement_BST = weights_N.new_zeros(len(rows_ND) // num_student, num_student, num_teacher)
        for slab in slabs_of(len(prototypes_KD), _width(rows_ND)):
            targets_Mk, old_M, new_M = targets.first(slab)
            logits_Nk = _logits(rows_ND, prototypes_KD, temperature, slab)
            softmax.add(logits_Nk)
            # the mean logit of row (s, b) under target (t, b), so far
            old_BT, new_BT = (share_M.unflatten(0, (num_teacher, -1)).T for share_M in (old_M, new_M))
            within_BST = _mean_logits(logits_Nk, targets_Mk, num_student, num_teacher)
            agreement_BST = agreement_BST * old_BT[:, None] + within_BST * new_BT[:, None]
        kept, kept_of_targets = softmax.take_kept(), targets.take_kept()
        needed = (rows_ND, prototypes_KD, weights_N, mix_ST, softmax.total_N)
        ctx.save_for_backward(*needed, *kept, *kept_of_targets)
        ctx.targets, ctx.temperature, ctx.num_kept = targets, temperature, len(kept)  # type: ignore[attr-defined]
        entropy = targets.entropy()
        ctx.mark_non_differentiable(entropy)
        # a row's cross-entropy is its total less its mean logit under its target
        agreement_N = torch.einsum("bst,st->sb", agreement_BST, mix_ST).flatten()
        return weights_N @ (softmax.total_N - agreement_N), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        rows_ND, prototypes_KD, weights_N, mix_ST, total_N, *both = ctx.saved_tensors  # type: ignore[attr-defined]
        targets: _Computed | _Given = ctx.targets  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        num_kept: int = ctx.num_kept  # type: ignore[attr-defined]
        kept, kept_of_targets = both[:num_kept], both[num_kept:]
        logits_of = partial(_logits, rows_ND, prototypes_KD, temperature)
        num_student, num_teacher = mix_ST.shape
        scale_N1 = (weights_N * (gradient / -temperature))[:, None]
        scaled_ND = (rows_ND * scale_N1).to(rows_ND.dtype)
        gradient_ND = torch.zeros_like(rows_ND, dtype=weights_N.dtype)
        gradient_KD = torch.empty_like(prototypes_KD)
        with torch.autocast(gradient.device.type, enabled=False):
            for number, slab in enumerate(slabs_of(len(prototypes_KD), _width(rows_ND))):
                of_slab = slice(2 * number, 2 * number + 2)
                targets_Mk = targets.again(slab, kept_of_targets[of_slab])
                probabilities_Nk = _probabilities(logits_of, slab, total_N, kept[of_slab])
                # -d loss / d logits: the mixed target less the own softmax
                probabilities_Nk.view(num_student, -1).addmm_(mix_ST, targets_Mk.reshape(num_teacher, -1), beta=-1)
                slope_Nk = probabilities_Nk.to(rows_ND.dtype)
                gradient_ND += slope_Nk @ prototypes_KD[slab]
                torch.mm(slope_Nk.T, scaled_ND, out=gradient_KD[slab])
        return gradient_ND.mul_(scale_N1).to(rows_ND.dtype), gradient_KD, None, None, None, None, None


def _mean_logits(logits_Nk: Tensor, targets_Mk: Tensor, num_student: int, num_teacher: int) -> Tensor:
    """(B, S, T): sums over a slab of the targets times the logits, of each pair of crops of an image."""
    if num_student == num_teacher == 1:  # twice as fast as products of single rows
        return torch.linalg.vecdot(logits_Nk, targets_Mk)[:, None, None]
    logits_BSk = logits_Nk.unflatten(0, (num_student, -1)).transpose(0, 1)
    return logits_BSk @ targets_Mk.unflatten(0, (num_teacher, -1)).permute(1, 2, 0)


def _shapes(
    rows_ND: Tensor, prototypes_KD: Tensor, targets: PrototypeTargets | Tensor, weights_N: Tensor, mix_ST: Tensor | None
) -> list[tuple[int, ...]]:
    """Those of the arguments, as the error of `prototype_cross_entropy` names them."""
    of_targets = targets.shape if isinstance(targets, Tensor) else (len(targets.rows), len(targets.prototypes))
    of_mix = (1, 1) if mix_ST is None else mix_ST.shape
    return [tuple(shape) for shape in (rows_ND.shape, prototypes_KD.shape, of_targets, weights_N.shape, of_mix)]


def _fit_together(
    rows: tuple[int, ...],
    prototypes: tuple[int, ...],
    targets: tuple[int, ...],
    weights: tuple[int, ...],
    mix: tuple[int, ...],
) -> bool:
    """Whether these are (N, D), (K, D), (M, K), (N,) and (S, T), with N = S * B and M = T * B."""
    if not (len(rows) == len(prototypes) == len(targets) == len(mix) == 2) or min(*mix, *prototypes) < 1:
        return False
    images, rest = divmod(rows[0], mix[0])
    wanted = ((rows[0],), (prototypes[0], rows[1]), (images * mix[1], prototypes[0]))
    return rest == 0 and (weights, prototypes, targets) == wanted


def _width(rows_ND: Tensor) -> int:
    """Prototypes in a slab for these rows."""
    num_logits = CPU_LOGITS if rows_ND.device.type == "cpu" else GPU_LOGITS
    return max(1, min(SLAB, num_logits // max(len(rows_ND), 1)))


def _logits(rows_ND: Tensor, prototypes_KD: Tensor, temperature: float, slab: slice) -> Tensor:
    """(N, k), newly allocated."""
    return (rows_ND @ prototypes_KD[slab].T).to(sum_dtype(rows_ND)).mul_(1 / temperature)
