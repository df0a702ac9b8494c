"""Which of timm's networks have tokens, by name, and what the others are told."""

import pytest
import timm
import torch
from torch import nn

from ssl_pipeline.backbones import Backbone, BackboneConfig, TokenBackbone, create_backbone, require_tokens
from ssl_pipeline.config import ConfigError


def on_meta(name: str, **changes: object) -> Backbone:
    with torch.device("meta"):
        return create_backbone(BackboneConfig(name=name, **changes))


@pytest.mark.parametrize(
    ("name", "patch_size", "stride", "num_prefix_tokens", "takes_some_patches"),
    [
        ("vit_small_patch16_224", 16, 16, 1, True),
        ("vit_base_patch14_dinov2", 14, 14, 1, True),
        ("vit_small_patch14_reg4_dinov2", 14, 14, 5, True),
        ("vit_tiny_r_s16_p8_224", 32, 32, 1, False),  # on a ResNet's stem
        ("vit_small_r26_s32_224", 32, 32, 1, False),  # on a whole one
        ("vit_base_patch16_siglip_224", 16, 16, 0, True),
        ("deit3_small_patch16_224", 16, 16, 1, True),
        ("vit_small_patch16_dinov3", 16, 16, 5, True),
        ("vit_large_patch16_dinov3", 16, 16, 5, True),
        ("eva02_small_patch14_224", 14, 14, 1, True),
        ("vit_small_patch16_rope_mixed_224", 16, 16, 1, True),
        ("beit_base_patch16_224", 16, 16, 1, False),
        ("beitv2_base_patch16_224", 16, 16, 1, False),
        ("swin_tiny_patch4_window7_224", 4, 32, 0, False),
    ],
)
def test_networks_with_tokens(name, patch_size, stride, num_prefix_tokens, takes_some_patches):
    backbone = on_meta(name)
    assert isinstance(backbone, TokenBackbone)
    assert require_tokens(backbone, "iBOT") is backbone
    assert (backbone.patch_size, backbone.stride) == (patch_size, stride)
    assert (backbone.num_prefix_tokens, backbone.takes_some_patches) == (num_prefix_tokens, takes_some_patches)
    assert backbone.patch_dim == (96 if name.startswith("swin") else backbone.embed_dim)
    assert backbone.num_blocks == (24 if "large" in name else 12)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deit_tiny_distilled_patch16_224", {}),  # a subclass with a second class token
        ("vit_relpos_small_patch16_224", {}),
        ("swinv2_tiny_window8_256", {}),
        ("eva02_tiny_patch14_224", {"patch_drop_rate": 0.5}),
        ("resnet18", {}),
        ("convnext_atto", {}),
    ],
)
def test_networks_without_tokens_run_as_timm_runs_them_and_are_refused(name, arguments):
    backbone = on_meta(name, arguments=arguments)
    assert type(backbone) is Backbone
    with pytest.raises(ConfigError) as refused:
        require_tokens(backbone, "iBOT")
    assert str(refused.value) == (
        f"iBOT needs a backbone with patch tokens (a ViT). '{name}' has none. Networks with patch tokens: timm's "
        "VisionTransformer (vit_*, deit_*, vit_*_r_*), Eva (vit_*_dinov3, eva*), Beit (beit*) and SwinTransformer "
        "(swin_*)."
    )
    with pytest.raises(ConfigError, match=f"'{name}' has no patch tokens. Networks with patch tokens: timm's"):
        TokenBackbone(backbone.model)


def test_a_distilled_vit_keeps_its_own_forward_pass():
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    backbone = create_backbone(BackboneConfig(name="deit_tiny_distilled_patch16_224", arguments=arguments)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone(images), backbone.model(images))


def test_methods_that_leave_patches_out_refuse_networks_that_need_all():
    assert require_tokens(on_meta("vit_small_patch16_dinov3"), "MAE", some_patches=True).takes_some_patches
    for name in ("beit_base_patch16_224", "swin_tiny_patch4_window7_224", "vit_tiny_r_s16_p8_224"):
        with pytest.raises(ConfigError) as refused:
            require_tokens(on_meta(name), "MAE", some_patches=True)
        assert str(refused.value) == (
            f"MAE leaves patches out, but '{name}' needs all patches of an image. Networks that take some of them: "
            "timm's VisionTransformer without a stem of convolutions, Eva, and a Beit without relative positions."
        )


def test_a_network_that_is_not_timms_goes_by_its_class():
    class Pixels(nn.Flatten):
        num_features = 3

    with pytest.raises(ConfigError, match="'Pixels' has none"):
        require_tokens(Backbone(Pixels()), "iBOT")


def test_a_bare_timm_model_is_wrapped():
    model = timm.create_model(
        "vit_small_patch16_dinov3", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
    ).eval()
    tokens = TokenBackbone(model).tokens(torch.zeros(1, 3, 48, 32))
    assert (tokens.grid, tokens.cls.shape, tokens.registers.shape) == ((6, 4), (1, 32), (1, 4, 32))


def test_settings_of_vits_go_where_they_make_sense():
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    dinov3 = create_backbone(BackboneConfig(name="vit_small_patch16_dinov3", arguments=tiny, frozen_patch_embed=True))
    assert not dinov3.model.patch_embed.proj.weight.requires_grad
    with pytest.raises(ConfigError, match="needs a ViT with a position table"):
        create_backbone(BackboneConfig(name="vit_small_patch16_dinov3", arguments=tiny, fixed_positions=True))
    with pytest.raises(
        ConfigError, match=r"works only with timm's VisionTransformer .* 'vit_small_patch16_dinov3' is one of its Evas"
    ):
        create_backbone(BackboneConfig(name="vit_small_patch16_dinov3", arguments=tiny, initial_weights="mae"))
