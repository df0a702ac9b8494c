"""What iBOT, DINOv2 and DINOv3 have in common: a student that sees large crops with masked patches, and small crops.

It predicts what its teacher, which sees the large crops whole, says of their class tokens and of the masked patches
(Zhou et al., 2021, https://arxiv.org/abs/2111.07832).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_pipeline.backbones import Backbone, TokenBackbone, require_tokens
from ssl_pipeline.batch import Batch
from ssl_pipeline.config import ConfigError
from ssl_pipeline.losses import (
    PrototypeTargets,
    centred_targets,
    crop_pairs,
    masked_patch_weights,
    prototype_cross_entropy,
    sinkhorn_targets,
    total_logits,
)
from ssl_pipeline.losses.precision import sum_dtype
from ssl_pipeline.modules.memory import Centre

# Axes: B images in T large crops and S crops of all; N = T * B large crops of L patches, M of these masked; D, E
# dimensions of tokens and of the heads' rows, K prototypes.


@dataclass(frozen=True)
class MaskedPatches:
    """Which patches of the large crops the student does not see: mask (N, L), and where it is True (M,)."""

    mask: Tensor
    places: Tensor

    @classmethod
    def of(cls, batch: Batch, *, masking: bool = True) -> MaskedPatches:
        """Those of a batch; none at all unless `masking`."""
        mask_NL, places_M = batch.masks["global"].flatten(0, 1), batch.masked_patches("global")
        return cls(mask_NL, places_M) if masking else cls(torch.zeros_like(mask_NL), places_M[:0])

    def take(self, patches_NLD: Tensor) -> Tensor:
        """The masked patches (M, D), image by image."""
        return patches_NLD.flatten(0, 1).index_select(0, self.places)


@dataclass(frozen=True)
class StudentTokens:
    """Class tokens (S * B, D) of all crops, crop by crop, the large ones first; patches (N, L, D) of the large ones."""

    classes: Tensor
    patches: Tensor


def student_tokens(
    backbone: TokenBackbone, batch: Batch, masked: MaskedPatches, *, mask_token: Tensor
) -> StudentTokens:
    """The student's tokens, in one pass for each resolution."""
    large = backbone.tokens(batch.views["global"].flatten(0, 1), mask=masked.mask, mask_token=mask_token)
    classes = [class_tokens(large.cls)]
    if "local" in batch.views:
        classes.append(class_tokens(backbone.tokens(batch.views["local"].flatten(0, 1)).cls))
    return StudentTokens(torch.cat(classes), large.patches)


def class_tokens(cls_ND: Tensor | None) -> Tensor:
    """The class tokens of a network that has one, as `with_class_token` has made sure."""
    assert cls_ND is not None
    return cls_ND


def with_class_token(backbone: Backbone, method: str) -> TokenBackbone:
    """`backbone`, if its class token and its patches are all that it trains; raises ConfigError that says what is not.

    A Swin has patches of another size at its end than those that are masked, and no class token.
    """
    with_tokens = require_tokens(backbone, method, no_pooling=True)
    if getattr(backbone.model, "cls_token", None) is None:
        raise ConfigError(f"{method} needs a backbone with a class token. '{backbone.name}' has none; try vit_*.")
    return with_tokens


def targets_of(
    rows_ME: Tensor, prototypes_KE: Tensor, centre: Centre | None, *, temperature: float, iterations: int
) -> PrototypeTargets:
    """What the teacher says: by a centre, or without one by Sinkhorn-Knopp over the rows of all processes."""
    if centre is not None:
        return centred_targets(rows_ME, prototypes_KE, centre.value, temperature=temperature)
    return sinkhorn_targets(rows_ME, prototypes_KE, epsilon=temperature, num_iterations=iterations)


def class_token_loss(
    student_NE: Tensor,
    prototypes_KE: Tensor,
    targets: PrototypeTargets,
    *,
    num_images: int,
    temperature: float,
    leave_out_same_crop: bool = True,
    local_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`self_distillation` of the class tokens of all crops; and the mean entropy of the targets.

    Same crops are pairs of a large crop of the student with itself at the teacher. `local_weight` weighs the pairs with
    a small crop, whose number stays in the mean (DINOv3).
    """
    weights_N, mix_ST = crop_pairs(
        student_NE, targets.rows, num_images=num_images, leave_out_same_crop=leave_out_same_crop
    )
    if local_weight != 1.0:
        weights_N = weights_N.clone()
        weights_N[len(targets.rows) :] *= local_weight
    return prototype_cross_entropy(
        student_NE, prototypes_KE, targets, weights_N, temperature=temperature, mix_ST=mix_ST
    )


def patch_loss(
    student_ME: Tensor, prototypes_KE: Tensor, targets: PrototypeTargets, masked: MaskedPatches, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """`masked_patch_loss` of the masked patches; and the mean entropy of the targets."""
    weights_M = masked_patch_weights(masked.mask, len(student_ME), dtype=sum_dtype(student_ME))
    return prototype_cross_entropy(student_ME, prototypes_KE, targets, weights_M, temperature=temperature)


def centre_carry(name: str, rows_ME: Tensor, prototypes_KE: Tensor) -> dict[str, Tensor]:
    """What `update_centre` needs of a micro-batch: the rows' total logits, and how many rows there are."""
    total_K = total_logits(rows_ME, prototypes_KE)
    return {f"{name}_total": total_K, f"{name}_rows": total_K.new_full((), len(rows_ME))}


def update_centre(centre: Centre, name: str, carries: Sequence[dict[str, Tensor]], *, momentum: float) -> None:
    """Move a centre by the rows of all micro-batches and processes."""
    total_K, rows = (torch.stack([carry[f"{name}_{of}"] for carry in carries]).sum(dim=0) for of in ("total", "rows"))
    centre.update(total_K, num_rows=rows, momentum=momentum)
