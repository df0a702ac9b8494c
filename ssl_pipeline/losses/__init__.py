"""The losses as functions of plain tensors: no state, no randomness, the dtype of the inputs kept."""

from ssl_pipeline.losses.contrastive import info_nce, moco_v3_loss, nt_xent
from ssl_pipeline.losses.distillation import byol_loss, centred_softmax, self_distillation, simsiam_loss
from ssl_pipeline.losses.precision import float32
from ssl_pipeline.losses.prototypes import mean_logits, prototype_distillation
from ssl_pipeline.losses.reconstruction import mae_loss, removed_patches_loss
from ssl_pipeline.losses.semi_supervised import fixmatch_loss

__all__ = [
    "byol_loss",
    "centred_softmax",
    "fixmatch_loss",
    "float32",
    "info_nce",
    "mae_loss",
    "mean_logits",
    "moco_v3_loss",
    "nt_xent",
    "prototype_distillation",
    "removed_patches_loss",
    "self_distillation",
    "simsiam_loss",
]
