"""Layer-wise learning rates against the assignment written out by name."""

import pytest
import timm
from torch import nn

from ssl_pipeline.backbones import BackboneConfig, create_backbone, layer_decay_groups, layer_lr_scale
from ssl_pipeline.config import ConfigError
from tests.backbones.tiny_vit import TINY_VIT, tiny_vit


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("cls_token", 13),
        ("pos_embed", 13),
        ("mask_token", 13),
        ("reg_token", 13),
        ("patch_embed.proj.weight", 13),
        ("patch_embed.norm.bias", 13),
        ("blocks.0.attn.qkv.weight", 12),
        ("blocks.1.norm1.weight", 11),
        ("blocks.10.norm1.weight", 2),
        ("blocks.11.ls2.gamma", 1),
        ("norm.weight", 0),
        ("fc_norm.weight", 0),
        ("rope.freqs", 0),
        ("head.weight", 0),
    ],
)
def test_the_rate_shrinks_from_layer_to_layer(name, power):
    assert layer_lr_scale(name, num_blocks=12, decay=0.75) == pytest.approx(0.75**power, rel=1e-12)
    assert layer_lr_scale(name, num_blocks=12, decay=1.0) == 1.0
    with_patch_embed_scale = layer_lr_scale(name, num_blocks=12, decay=0.9, patch_embed_scale=0.2)
    assert with_patch_embed_scale == pytest.approx(0.9**power * (0.2 if "patch_embed" in name else 1), rel=1e-12)


def settings_of(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """(lr_scale, weight_decay) of each parameter that is in a group; each must be in one alone."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members))
    return {name_of[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_groups_of_a_classifier_are_those_of_maes_fine_tuning():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **{**TINY_VIT, "depth": 3}, reg_tokens=2)
    model.norm.weight.requires_grad_(False)
    found = settings_of(model, layer_decay_groups(model, decay=0.5, weight_decay=0.05))
    expected = {}
    for name, parameter in model.named_parameters():
        if name == "norm.weight":
            continue
        layer = 4
        if name.split(".")[0] in ("cls_token", "pos_embed", "reg_token", "patch_embed"):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decayed = parameter.ndim > 1 and name not in ("cls_token", "pos_embed", "reg_token")
        expected[name] = (0.5 ** (4 - layer), 0.05 if decayed else 0.0)
    assert found == expected
    assert found["head.weight"] == (1.0, 0.05)
    assert len(layer_decay_groups(model, decay=0.5, weight_decay=0.05)) == 10  # five layers, decayed and not


def test_a_vit_inside_another_module_is_found():
    backbone = tiny_vit()
    network = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(48, 3)})
    groups = layer_decay_groups(network, decay=0.5, weight_decay=0.1, patch_embed_scale=0.2)
    found = settings_of(network, groups)
    assert found["backbone.model.cls_token"] == (0.125, 0.0)
    assert found["backbone.model.patch_embed.proj.weight"] == (pytest.approx(0.025), 0.1)
    assert found["backbone.model.blocks.1.attn.qkv.weight"] == (0.5, 0.1)
    assert found["backbone.model.norm.weight"] == (1.0, 0.0)
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0)


def test_networks_without_blocks_or_with_several_rows_of_them_are_refused():
    with pytest.raises(ConfigError, match=r"need one network with blocks.* Got none\.$"):
        layer_decay_groups(create_backbone(BackboneConfig(name="test_resnet")), decay=0.5, weight_decay=0.1)
    both = nn.ModuleDict({"student": tiny_vit(), "teacher": tiny_vit()})
    with pytest.raises(ConfigError, match=r"Got 'student\.model\.blocks', 'teacher\.model\.blocks'\.$"):
        layer_decay_groups(both, decay=0.5, weight_decay=0.1)
