"""The losses as functions of plain tensors: no state, no randomness, the dtype of the inputs kept."""

from __future__ import annotations

from ssl_pipeline.losses.annealed import annealed_cross_entropy, fairness_loss, uda_loss
from ssl_pipeline.losses.assignment import centred_softmax, sinkhorn_knopp
from ssl_pipeline.losses.consistency import (
    consistency_loss,
    labelled_cross_entropy,
    mixmatch_loss,
    pi_model_loss,
    probability_error,
)
from ssl_pipeline.losses.contrastive import info_nce, moco_v3_loss, nnclr_loss, nt_xent
from ssl_pipeline.losses.discrete import (
    gumbel_softmax,
    logit_laplace_loss,
    masked_token_loss,
    uniform_kl_loss,
)
from ssl_pipeline.losses.distillation import byol_loss, feature_loss, self_distillation, simsiam_loss
from ssl_pipeline.losses.masked_patches import masked_patch_loss, masked_patch_weights
from ssl_pipeline.losses.precision import float32
from ssl_pipeline.losses.prototype_targets import (
    PrototypeTargets,
    centred_targets,
    prototypes_used,
    sinkhorn_targets,
)
from ssl_pipeline.losses.prototypes import (
    crop_pairs,
    prototype_cross_entropy,
    total_logits,
)
from ssl_pipeline.losses.reconstruction import mae_loss, removed_patches_loss, simmim_loss
from ssl_pipeline.losses.redundancy import barlow_twins_loss, vicreg_loss
from ssl_pipeline.losses.regularizers import gram_anchoring_loss, koleo_loss
from ssl_pipeline.losses.semi_supervised import (
    align_distribution,
    fixmatch_loss,
    guess_labels,
    interpolate_logits,
    pseudo_label_loss,
    relative_threshold,
    sharpen,
    weighted_cross_entropy,
)
from ssl_pipeline.losses.swapped import swav_loss

__all__ = [
    "PrototypeTargets",
    "align_distribution",
    "annealed_cross_entropy",
    "barlow_twins_loss",
    "byol_loss",
    "centred_softmax",
    "centred_targets",
    "consistency_loss",
    "crop_pairs",
    "fairness_loss",
    "feature_loss",
    "fixmatch_loss",
    "float32",
    "gram_anchoring_loss",
    "guess_labels",
    "gumbel_softmax",
    "info_nce",
    "interpolate_logits",
    "koleo_loss",
    "labelled_cross_entropy",
    "logit_laplace_loss",
    "mae_loss",
    "masked_patch_loss",
    "masked_patch_weights",
    "masked_token_loss",
    "mixmatch_loss",
    "moco_v3_loss",
    "nnclr_loss",
    "nt_xent",
    "pi_model_loss",
    "probability_error",
    "prototype_cross_entropy",
    "prototypes_used",
    "pseudo_label_loss",
    "relative_threshold",
    "removed_patches_loss",
    "self_distillation",
    "sharpen",
    "simmim_loss",
    "simsiam_loss",
    "sinkhorn_knopp",
    "sinkhorn_targets",
    "swav_loss",
    "total_logits",
    "uda_loss",
    "uniform_kl_loss",
    "vicreg_loss",
    "weighted_cross_entropy",
]
