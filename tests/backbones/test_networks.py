"""Backbones: features of any timm model, tokens of a ViT at any size."""

import pytest
import torch
from timm.layers import DropPath

from ssl_pipeline.backbones import BackboneConfig, TokenBackbone, create_backbone, without_drop_path
from ssl_pipeline.backbones.patches import patchify, take_patches
from tests.backbones.tiny_vit import images, tiny_vit


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "regnetx_002"])
def test_a_cnn_gives_pooled_features_of_embed_dim(name):
    backbone = create_backbone(BackboneConfig(name=name)).eval()
    features = backbone(images(64))
    assert features.shape == (2, backbone.embed_dim)
    assert not isinstance(backbone, TokenBackbone)
    torch.testing.assert_close(features, backbone.model(images(64)))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reg_tokens": 2},
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "map"},
        {"pos_embed": "none"},
        {"pre_norm": True},
    ],
)
def test_a_vit_gives_the_features_of_timm_at_its_own_size(arguments):
    backbone = tiny_vit(arguments=arguments)
    assert isinstance(backbone, TokenBackbone)
    assert backbone(images()).shape == (2, backbone.embed_dim)
    torch.testing.assert_close(backbone(images()), backbone.model(images()))


@pytest.mark.parametrize("size", [16, 24, 64])
def test_a_vit_takes_images_of_any_size(size):
    backbone = tiny_vit()
    assert backbone(images(size)).shape == (2, 48)
    backbone(images(size)).sum().backward()
    assert backbone.model.pos_embed.grad.abs().min() > 0 or size < 32


def test_an_image_between_two_patches_is_refused():
    with pytest.raises(ValueError, match=r"multiples of the patch size 8. Got 30x30"):
        tiny_vit()(images(30))


def test_embed_and_encode_work_on_kept_tokens_alone():
    backbone = tiny_vit()
    tokens = backbone.embed(images())
    assert tokens.shape == (2, 16, 48)
    assert (backbone.patch_size, backbone.grid, backbone.num_prefix_tokens) == (8, (4, 4), 1)
    encoded = backbone.encode(tokens[:, [3, 7, 1]])
    assert encoded.shape == (2, 4, 48)
    # without positions between them, attention does not care about the order of its tokens
    torch.testing.assert_close(backbone.encode(tokens[:, [1, 3, 7]])[:, [0, 2, 3, 1]], encoded)


@pytest.mark.parametrize(
    "arguments", [{}, {"reg_tokens": 2}, {"pos_embed": "none"}, {"no_embed_class": True}, {"pre_norm": True}]
)
def test_some_patches_are_embedded_as_in_the_whole_image(arguments):
    backbone = tiny_vit(arguments=arguments).double()
    whole = images().double()
    places = torch.tensor([[3, 7, 1], [15, 0, 8]])
    expected = take_patches(backbone.embed(whole), places)
    actual = backbone.embed_patches(take_patches(patchify(whole, 8), places), places)
    torch.testing.assert_close(actual, expected)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    gradients = [
        torch.autograd.grad(result.square().sum(), trained, allow_unused=True) for result in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_positions_belong_to_their_patch():
    backbone = tiny_vit()
    with torch.no_grad():
        backbone.model.patch_embed.proj.weight.zero_()
        backbone.model.patch_embed.proj.bias.zero_()
    torch.testing.assert_close(backbone.embed(images())[0], backbone.model.pos_embed[0, 1:])


@pytest.mark.slow
def test_a_vit_compiles_in_place_for_two_sizes():
    backbone = tiny_vit()
    expected = [backbone(images(size)) for size in (32, 16)]
    backbone.compile(backend="eager", fullgraph=True)  # traced, not translated, which would take a minute
    torch.testing.assert_close([backbone(images(size)) for size in (32, 16)], expected)


def test_drop_path_grows_to_the_last_block_and_can_be_switched_off():
    backbone = tiny_vit(drop_path=0.2)
    rates = [part.drop_prob for part in backbone.modules() if isinstance(part, DropPath)]
    assert max(rates) == pytest.approx(0.2)
    without_drop_path(backbone)
    backbone.train()
    assert torch.equal(backbone(images()), backbone(images()))
