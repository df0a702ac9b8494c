"""Attention of the last block and the colours of patches; the map of the embeddings."""

from __future__ import annotations

import pytest
import torch

from ssl_pipeline.backbones import BackboneConfig, TokenBackbone, create_backbone
from ssl_pipeline.eval.page.embedding_map import principal_plane, spread_out
from ssl_pipeline.eval.page.token_maps import attention_of_last_block, colours_of_patches

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


def network(name: str, arguments: dict[str, object]) -> TokenBackbone:
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(name=name, arguments=arguments)).eval()
    assert isinstance(backbone, TokenBackbone)
    return backbone


@pytest.mark.parametrize(
    ("name", "arguments", "grid"),
    [("vit_tiny_patch16_224", VIT, 4), ("vit_small_patch16_dinov3", EVA, 4), ("beit_base_patch16_224", VIT, 4)],
)
def test_attention_is_a_share_of_one(name: str, arguments: dict[str, object], grid: int) -> None:
    backbone = network(name, arguments)
    images = torch.randn(3, 3, arguments["img_size"], arguments["img_size"])
    before = backbone(images)
    seen = attention_of_last_block(backbone, images)
    assert seen is not None
    assert seen.shape == (3, 2, grid, grid)
    assert ((seen > 0) & (seen < 1)).all()
    assert (seen.sum(dim=(2, 3)) < 1 + 1e-5).all()
    assert torch.equal(backbone(images), before), "nothing is left of the hooks"


def test_attention_is_that_of_the_class_token() -> None:
    backbone = network("vit_tiny_patch16_224", VIT)
    attention = backbone.model.blocks[-1].attn
    torch.nn.init.zeros_(attention.qkv.weight)
    torch.nn.init.zeros_(attention.qkv.bias)
    seen = attention_of_last_block(backbone, torch.randn(1, 3, 16, 16))
    torch.testing.assert_close(seen, torch.full((1, 2, 4, 4), 1 / 17))  # all 17 tokens alike


def test_windows_have_no_attention_of_the_whole() -> None:
    assert attention_of_last_block(network("swin_tiny_patch4_window7_224", SWIN), torch.randn(1, 3, 32, 32)) is None


def test_patches_of_one_kind_have_one_colour() -> None:
    kinds = torch.eye(8)[:3] * torch.tensor([[1.0], [2.0], [3.0]])
    order = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    colours = colours_of_patches(kinds[order])
    assert colours.shape == (2, 3, 4)
    flat, of_kind = colours.transpose(1, 2).flatten(0, 1), order.flatten()
    for kind in range(3):
        torch.testing.assert_close(
            flat[of_kind == kind], flat[of_kind == kind][:1].expand(int((of_kind == kind).sum()), 3)
        )
    assert len({tuple(colour.round().int().tolist()) for colour in flat}) == 3


def test_the_plane_has_the_largest_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator) * torch.tensor([0.1, 5.0, 0.1, 2.0, 0.1])
    plane, share = principal_plane(features)
    centred = features - features.mean(dim=0)
    for axis, dimension in ((0, 1), (1, 3)):
        cosine = torch.nn.functional.cosine_similarity(plane[:, axis], centred[:, dimension], dim=0)
        assert abs(cosine.item()) > 0.99
    assert 0.99 < share < 1


def test_pictures_do_not_lie_on_each_other() -> None:
    points = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) * 100
    chosen = points[spread_out(points, 50, closest=10.0)]
    apart = (chosen[:, None] - chosen).abs().amax(dim=-1) + 1000 * torch.eye(len(chosen))
    assert apart.min() >= 10
    assert len(spread_out(torch.zeros(9, 2), 5, closest=1.0)) == 1
