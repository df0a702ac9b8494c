"""The losses as functions of plain tensors: no state, no randomness, the dtype of the inputs kept."""

from ssl_pipeline.losses.assignment import centred_softmax, sinkhorn_knopp
from ssl_pipeline.losses.contrastive import info_nce, moco_v3_loss, nt_xent
from ssl_pipeline.losses.distillation import byol_loss, self_distillation, simsiam_loss
from ssl_pipeline.losses.precision import float32
from ssl_pipeline.losses.prototype_targets import PrototypeTargets, centred_targets, sinkhorn_targets
from ssl_pipeline.losses.prototypes import (
    crop_pairs,
    mean_logits,
    prototype_cross_entropy,
    prototype_distillation,
    total_logits,
)
from ssl_pipeline.losses.reconstruction import mae_loss, removed_patches_loss
from ssl_pipeline.losses.semi_supervised import fixmatch_loss

__all__ = [
    "PrototypeTargets",
    "byol_loss",
    "centred_softmax",
    "centred_targets",
    "crop_pairs",
    "fixmatch_loss",
    "float32",
    "info_nce",
    "mae_loss",
    "mean_logits",
    "moco_v3_loss",
    "nt_xent",
    "prototype_cross_entropy",
    "prototype_distillation",
    "removed_patches_loss",
    "self_distillation",
    "simsiam_loss",
    "sinkhorn_knopp",
    "sinkhorn_targets",
    "total_logits",
]
