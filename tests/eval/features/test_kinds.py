"""What is kept of each image, against the network's own tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_pipeline.backbones import BackboneConfig, TokenBackbone, create_backbone
from ssl_pipeline.config import ConfigError
from ssl_pipeline.eval.features.kinds import KINDS, FeatureKinds

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def vit(**arguments: object) -> TokenBackbone:
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(name="vit_tiny_patch16_224", arguments={**VIT, **arguments}))
    assert isinstance(backbone, TokenBackbone)
    return backbone.eval()


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_all_kinds_come_from_one_pass(pool: str) -> None:
    backbone, images = vit(global_pool=pool), torch.randn(2, 3, 16, 16)
    found = FeatureKinds(backbone, KINDS, last_blocks=2)(images)
    tokens = backbone.tokens(images, layers=(1, 2))
    torch.testing.assert_close(found["pooled"], backbone(images))
    torch.testing.assert_close(found["class"], tokens.cls)
    torch.testing.assert_close(found["patches"], tokens.patches)
    torch.testing.assert_close(found["mean"], tokens.patches.mean(dim=1))
    torch.testing.assert_close(found["blocks"], torch.cat([tokens.layers[0].cls, tokens.layers[1].cls], dim=1))
    assert {kind: tuple(value.shape) for kind, value in found.items()} == {
        "pooled": (2, 24),
        "class": (2, 24),
        "mean": (2, 24),
        "blocks": (2, 48),
        "patches": (2, 4, 24),
        "map": (2, 4, 24),
    }


@torch.no_grad()
def test_without_a_class_token_blocks_are_means_of_patches() -> None:
    backbone, images = vit(class_token=False, global_pool="avg"), torch.randn(2, 3, 16, 16)
    blocks = FeatureKinds(backbone, ("blocks",), last_blocks=1)(images)["blocks"]
    torch.testing.assert_close(blocks, backbone.tokens(images, layers=(-1,)).layers[0].patches.mean(dim=1))
    with pytest.raises(ConfigError, match=r"kind=class needs a class token"):
        FeatureKinds(backbone, ("class",))


def test_what_a_network_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kind=patches needs a network with tokens. 'Flatten' has none"):
        FeatureKinds(nn.Flatten(), ("patches",))
    with pytest.raises(ConfigError, match=r"last_blocks=4 is more than .* has. Take at most 3"):
        FeatureKinds(vit(), ("blocks",), last_blocks=4)
