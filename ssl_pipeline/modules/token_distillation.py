"""What iBOT, DINOv2 and DINOv3 have in common: a student predicts its teacher's class tokens and masked patches.

iBOT (Zhou et al., 2021, https://arxiv.org/abs/2111.07832).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_pipeline.backbones import TokenBackbone, layer_lr_scale
from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.config import ConfigError
from ssl_pipeline.distributed import mean_over_ranks, world_size
from ssl_pipeline.losses import (
    PrototypeTargets,
    centred_targets,
    crop_pairs,
    koleo_loss,
    masked_patch_weights,
    prototype_cross_entropy,
    prototypes_used,
    total_logits,
)
from ssl_pipeline.losses.precision import in_matmul_dtype, sum_dtype
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.masked_tokens import ClassesAndPatches, MaskedPatches, student_tokens, teacher_tokens
from ssl_pipeline.modules.memory import Centre
from ssl_pipeline.modules.token_distillation_config import TokenDistillationConfig
from ssl_pipeline.modules.token_heads import TokenHeads
from ssl_pipeline.optim.rules import ParamRule, layer_decay_rules
from ssl_pipeline.schedule import Duration

# Axes: N class tokens of all crops, or large crops of L patches; M masked patches; E dimensions of the heads' rows, K
# prototypes.
CENTRES = ("class", "patch")
Centres = tuple[Centre | None, Centre | None]


@dataclass(frozen=True)
class Comparison:
    """How a student is compared with its teacher in a step.

    temperatures, centres: for class tokens, and for patches.
    assign: what makes targets of rows, prototypes and an epsilon where there is no centre (`sinkhorn_targets`).
    all_patches: whether the patches' centre follows all patches (iBOT) or the masked ones alone (DINOv2).
    local_weight: of pairs with a small crop, whose number stays in the mean (DINOv3).
    is_logged: of the step, as in Progress.
    """

    student_temperature: float
    temperatures: tuple[float, float]
    centres: Centres
    assign: Callable[..., PrototypeTargets] | None = None
    all_patches: bool = False
    leave_out_same_crop: bool = True
    local_weight: float = 1.0
    is_logged: bool = True


@dataclass(frozen=True)
class Compared:
    """Both losses, the metrics, what the centres need, and the student's and the teacher's tokens before the heads."""

    class_loss: Tensor
    patch_loss: Tensor
    metrics: dict[str, Tensor]
    carry: dict[str, Tensor]
    student: ClassesAndPatches
    teacher: ClassesAndPatches


def compare(
    student: Encoder[TokenHeads],
    teacher: Encoder[TokenHeads],
    batch: Batch,
    masked: MaskedPatches,
    how: Comparison,
    *,
    mask_token: Tensor,
) -> Compared:
    """`self_distillation` of the class tokens of all crops, and `masked_patch_loss` of the large crops' patches.

    The student goes through its backbone once per resolution; heads see only masked patches, except the teacher's where
    its centre follows all.
    """
    with torch.no_grad():
        seen = teacher_tokens(teacher.backbone, batch)
        all_NLE = teacher.head.patch_rows(seen.patches) if how.all_patches else None
        patches_ME = teacher.head.patch_rows(masked.take(seen.patches)) if all_NLE is None else masked.take(all_NLE)
        rows = (teacher.head.class_rows(seen.classes), patches_ME)
        prototypes = teacher.head.prototypes()
        carry = _carry((rows[0], patches_ME if all_NLE is None else all_NLE), prototypes, how.centres)
        targets = [
            _targets(*given, assign=how.assign)
            for given in zip(rows, in_matmul_dtype(*prototypes), how.centres, how.temperatures, strict=True)
        ]
    predicted = student_tokens(student.backbone, batch, masked, mask_token=mask_token)
    class_prototypes, patch_prototypes = in_matmul_dtype(*student.head.prototypes())
    num_images = batch.views["global"].shape[1]
    class_rows_NE = student.head.class_rows(predicted.classes)
    class_loss, class_entropy = _class_loss(class_rows_NE, class_prototypes, targets[0], how, num_images=num_images)
    patch_rows_ME = student.head.patch_rows(masked.take(predicted.patches))
    weights_M = masked_patch_weights(masked.mask, len(patch_rows_ME), dtype=sum_dtype(patch_rows_ME))
    patch_loss, patch_entropy = prototype_cross_entropy(
        patch_rows_ME, patch_prototypes, targets[1], weights_M, temperature=how.student_temperature
    )
    metrics = {"class_loss": class_loss.detach(), "patch_loss": patch_loss.detach()}
    if how.is_logged:
        # processes have masked patches in different numbers
        metrics |= {
            "target_entropy": class_entropy,
            "patch_target_entropy": _mean_over_rows(patch_entropy, len(patch_rows_ME)),
            "prototypes_used": prototypes_used(targets[0]),
        }
    return Compared(class_loss, patch_loss, metrics, carry, predicted, seen)


def koleo_of_large_crops(found: Compared, batch: Batch, *, num_neighbours: int = 1, per_process: bool) -> Tensor:
    """KoLeo of the student's class tokens before the head, each large crop on its own, summed."""
    num_crops, num_images = batch.views["global"].shape[:2]
    crops_TBD = found.student.classes[: num_crops * num_images].unflatten(0, (num_crops, num_images))
    of_crops = [koleo_loss(crop, num_neighbours=num_neighbours, per_process=per_process) for crop in crops_TBD]
    return torch.stack(of_crops).sum()


def check_batch(facts: RunFacts, *, num_neighbours: int, per_process: bool, sinkhorn: bool) -> None:
    """Raises ConfigError if there are too few images at once for KoLeo's neighbours (0: no KoLeo), or for Sinkhorn."""
    at_once = facts.micro_batch or facts.global_batch
    searched = at_once // world_size() if per_process else at_once
    if searched <= num_neighbours:
        where = " in each process" if per_process else ""
        which = "nearest other image" if num_neighbours == 1 else f"{num_neighbours} nearest other images"
        raise ConfigError(
            f"KoLeo looks for the {which}, so it needs at least {num_neighbours + 1} at once{where}. Got {searched}; "
            "raise data.batch_size, or set method.koleo_weight=0."
        )
    if sinkhorn and at_once < 2:
        raise ConfigError(
            "Sinkhorn-Knopp shares the images of a batch out over the prototypes, so it needs at least 2 images at "
            f"once. Got {at_once}; raise data.batch_size."
        )


def update_centres(centres: Centres, carries: Sequence[dict[str, Tensor]], *, momenta: tuple[float, float]) -> None:
    """Move the centres by the rows of all micro-batches and processes."""
    for name, centre, momentum in zip(CENTRES, centres, momenta, strict=True):
        if centre is not None:
            total_K = torch.stack([carry[f"{name}_total"] for carry in carries]).sum(dim=0)
            num_rows = torch.stack([carry[f"{name}_rows"] for carry in carries]).sum()
            centre.update(total_K, num_rows=num_rows, momentum=momentum)


def _carry(rows: tuple[Tensor, Tensor], prototypes: tuple[Tensor, Tensor], centres: Centres) -> dict[str, Tensor]:
    """What `update_centres` needs of a micro-batch: the total of the rows' logits, and how many rows there are."""
    carry: dict[str, Tensor] = {}
    for name, rows_E, prototypes_KE, centre in zip(CENTRES, rows, prototypes, centres, strict=True):
        if centre is not None:
            total_K = total_logits(rows_E, prototypes_KE)
            carry |= {f"{name}_total": total_K, f"{name}_rows": total_K.new_full((), rows_E[..., 0].numel())}
    return carry


def _targets(
    rows_ME: Tensor,
    prototypes_KE: Tensor,
    centre: Centre | None,
    temperature: float,
    *,
    assign: Callable[..., PrototypeTargets] | None,
) -> PrototypeTargets:
    if centre is not None:
        return centred_targets(rows_ME, prototypes_KE, centre.value, temperature=temperature)
    assert assign is not None
    return assign(rows_ME, prototypes_KE, epsilon=temperature)


def _mean_over_rows(mean: Tensor, num_rows: int) -> Tensor:
    """The mean over the rows of all processes, of that over the `num_rows` of this one."""
    total = mean * num_rows if num_rows else torch.zeros_like(mean)
    both = mean_over_ranks(torch.stack([total, torch.full_like(total, num_rows)]))
    return both[0] / both[1].clamp(min=1 / world_size())


def _class_loss(
    student_NE: Tensor, prototypes_KE: Tensor, targets: PrototypeTargets, how: Comparison, *, num_images: int
) -> tuple[Tensor, Tensor]:
    weights_N, mix_ST = crop_pairs(
        student_NE, targets.rows, num_images=num_images, leave_out_same_crop=how.leave_out_same_crop
    )
    if how.local_weight != 1.0:
        num_large = len(targets.rows)
        weights_N = torch.cat([weights_N[:num_large], how.local_weight * weights_N[num_large:]])
    return prototype_cross_entropy(
        student_NE, prototypes_KE, targets, weights_N, temperature=how.student_temperature, mix_ST=mix_ST
    )


def rules_of(student: Encoder[TokenHeads], config: TokenDistillationConfig) -> tuple[ParamRule, ...]:
    """`distillation_rules` by the settings of DINOv2 and DINOv3."""
    return distillation_rules(
        student,
        frozen_for=config.freeze_prototypes_for,
        layer_decay=config.layer_decay,
        patch_embed_scale=config.patch_embed_lr_scale,
    )


def distillation_rules(
    student: Encoder[TokenHeads], *, frozen_for: Duration, layer_decay: float = 1.0, patch_embed_scale: float = 1.0
) -> tuple[ParamRule, ...]:
    """The rules of a method with a `student` and a `mask_token`: prototypes that begin frozen, layer-wise rates."""
    assert isinstance(student.backbone, TokenBackbone)
    token_scale = layer_lr_scale("mask_token", num_blocks=student.backbone.num_blocks, decay=layer_decay)
    return (
        *(ParamRule(f"student.head.{layer}", frozen_for=frozen_for) for layer in student.head.last_layers),
        *layer_decay_rules(
            student.backbone, "student.backbone.", decay=layer_decay, patch_embed_scale=patch_embed_scale
        ),
        *([ParamRule("mask_token", token_scale)] if token_scale != 1.0 else []),
    )
