"""What a recipe asks of masks and memory is possible, or refused before an image is read."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ssl_pipeline.augment.masks import draw_masks
from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.methods import build_method
from ssl_pipeline.training import preflight
from ssl_pipeline.training.preflight import check_recipe


def check(*argv: str) -> None:
    config = load(PretrainConfig, [*argv, "backbone.arguments.depth=1"], recipes=RECIPES)
    with torch.device("meta"):
        method = build_method(config.method, create_backbone(config.backbone))
    check_recipe(method, method.backbone, config.augment, config.data)


@pytest.mark.parametrize(("ratio", "hidden"), [("0.999", 64), ("0.99", 64)])
def test_a_mask_that_leaves_no_patch_is_refused(ratio, hidden):
    sentence = (
        f"method.mask_ratio must hide some of the 64 patches of augment.image.size=32 and leave some. Got {ratio}, "
        f"which hides {hidden}; choose another, or larger views."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        check("recipe=cifar10_mae_vit_tiny", f"method.mask_ratio={ratio}")


def test_masks_that_hide_and_leave_a_patch_pass():
    check("recipe=cifar10_mae_vit_tiny", "method.mask_ratio=0.98")  # leaves 1
    check("recipe=cifar10_mae_vit_tiny", "method.mask_ratio=0.001")  # hides 1


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        (MaskRule("random", 4, ratio=0.1), 7),
        (MaskRule("random", 4, ratio=0.75), 48),
        (MaskRule("random", 4, ratio=(0.2, 0.999)), 64),
        (MaskRule("units", 4, ratio=0.6, unit=2), 40),
        (MaskRule("units", 4, ratio=(0.2, 0.6), unit=2), 40),
        (MaskRule("blocks", 4, ratio=(0.1, 0.5)), 32),
    ],
    ids=["some", "three quarters", "a range", "units", "a range of units", "blocks"],
)
def test_no_view_hides_more_patches_than_the_rule_says(rule, most):
    assert rule.most_masked(64) == most
    masks_VBL = draw_masks(rule, 32, np.arange(200, dtype=np.uint64)[None] << np.uint64(32))
    assert most - 4 <= masks_VBL.sum(axis=-1).max() <= most


def test_a_batch_of_views_that_no_memory_holds_is_refused(monkeypatch):
    monkeypatch.setattr(preflight, "free_host_bytes", lambda: 10**9)
    check("recipe=cifar10_mae_vit_tiny")
    sentence = (
        "One batch of views takes 1.29 GB, and 1 GB of memory are free: data.batch_size=512 with views of 8 * 324 px. "
        "Lower data.batch_size, or count or size of the views."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        check("recipe=cifar10_mae_vit_tiny", "augment.image.size=324", "augment.image.count=8", "data.batch_size=512")
