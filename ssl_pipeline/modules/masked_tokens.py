"""A student that sees large crops with masked patches and small crops whole, as iBOT, DINOv2 and DINOv3 have it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_pipeline.backbones import Backbone, TokenBackbone, require_tokens
from ssl_pipeline.batch import Batch, MaskRule
from ssl_pipeline.config import ConfigError
from ssl_pipeline.modules.token_distillation_config import TokenDistillationConfig

# Axes: B images in T large crops and S crops of all; N = T * B large crops of L patches, M of these masked; D
# dimensions.


@dataclass(frozen=True)
class MaskedPatches:
    """Which patches of the large crops the student does not see: mask (N, L), and the places (M,) where it is True."""

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
class ClassesAndPatches:
    """Class tokens of crops, crop by crop, large ones first (S * B, D); patches of the large crops (N, L, D)."""

    classes: Tensor
    patches: Tensor


def student_tokens(backbone: Backbone, batch: Batch, masked: MaskedPatches, *, mask_token: Tensor) -> ClassesAndPatches:
    """What the student makes of all crops, in one pass for each resolution."""
    assert isinstance(backbone, TokenBackbone)
    large = backbone.tokens(batch.views["global"].flatten(0, 1), mask=masked.mask, mask_token=mask_token)
    classes = [_class_tokens(large.cls)]
    if "local" in batch.views:
        classes.append(_class_tokens(backbone.tokens(batch.views["local"].flatten(0, 1)).cls))
    return ClassesAndPatches(torch.cat(classes), large.patches)


def teacher_tokens(backbone: Backbone, batch: Batch) -> ClassesAndPatches:
    """What the teacher makes of the large crops, which it sees whole."""
    assert isinstance(backbone, TokenBackbone)
    large = backbone.tokens(batch.views["global"].flatten(0, 1))
    return ClassesAndPatches(_class_tokens(large.cls), large.patches)


def with_class_token(backbone: Backbone, method: str) -> TokenBackbone:
    """`backbone`, if it has patch tokens, a class token, and nothing that is trained after these; else ConfigError.

    A Swin has patches of another size at its end than those that are masked, and no class token.
    """
    if not isinstance(backbone, TokenBackbone) or getattr(backbone.model, "cls_token", None) is None:
        raise ConfigError(
            f"{method} needs a backbone with patch tokens and a class token. '{backbone.name}' does not have both; "
            "try vit_*."
        )
    return require_tokens(backbone, method, no_pooling=True)


def stratified_blocks(backbone: TokenBackbone, config: TokenDistillationConfig) -> MaskRule:
    """DINOv2's masks: blocks of at most half of the backbone's grid unless the settings say otherwise, ratios spread
    evenly over the optimizer step's crops."""
    min_block = config.mask_min_block
    if config.mask_max_block is not None and config.mask_max_block < min_block:
        raise ConfigError(
            f"method.mask_min_block={min_block} is larger than method.mask_max_block={config.mask_max_block}, the "
            "largest area of a block in patches. Lower the one, or raise the other."
        )
    return MaskRule(
        "blocks",
        backbone.patch_size,
        ratio=config.mask_ratio,
        probability=config.mask_probability,
        stratified=True,
        min_block=min_block,
        max_block=config.mask_max_block or max(min_block, backbone.grid[0] * backbone.grid[1] // 2),
    )


def _class_tokens(cls_ND: Tensor | None) -> Tensor:
    assert cls_ND is not None  # `with_class_token` has made sure
    return cls_ND
