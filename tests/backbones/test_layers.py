"""The layers of a network against its blocks, named by hand."""

import pytest
import timm
import torch

from ssl_pipeline.backbones import layer_lr_scale, layers_of
from ssl_pipeline.backbones.config import BackboneConfig
from ssl_pipeline.backbones.create import create_backbone
from ssl_pipeline.config import ConfigError
from tests.backbones.tiny_vit import tiny_vit


def layer_of_each(model: torch.nn.Module) -> dict[str, int]:
    """Of each parameter, by the first part whose name begins its own, as the optimizer finds it."""
    parts = layers_of(model).parts
    return {name: next(p.layer for p in parts if name.startswith(p.name)) for name, _ in model.named_parameters()}


def test_a_vit_has_the_layers_of_its_learning_rates():
    model = tiny_vit().model
    layers, num_blocks = layers_of(model), len(model.blocks)
    assert layers.after == num_blocks + 1
    for name, layer in layer_of_each(model).items():
        assert 0.5 ** (layers.after - layer) == layer_lr_scale(name, num_blocks=num_blocks, decay=0.5), name
    assert {part.name for part in layers.parts if part.is_token} == {"cls_token", "pos_embed"}


@pytest.mark.parametrize("name", ["resnet18", "test_convnext", "test_efficientnet", "wide_resnet28_2"])
def test_a_cnn_has_a_layer_for_each_block(name):
    with torch.device("meta"):
        model = create_backbone(BackboneConfig(name=name)).model
    found = layer_of_each(model)
    assert found[next(iter(found))] == 0
    assert layers_of(model).after == max(found.values()) + 1
    assert sorted(set(found.values())) == list(range(max(found.values()) + 1))
    assert [layer for layer in found.values()] == sorted(found.values())  # parameters stand in their order


def test_one_part_holds_all_of_a_block():
    model = timm.create_model("resnet18", num_classes=0)
    assert [part.name for part in layers_of(model).parts][:4] == ["conv1.", "bn1.", "layer1.0.", "layer1.1."]


def test_what_is_not_trained_is_in_no_layer():
    model = tiny_vit().model
    model.blocks[0].requires_grad_(False)
    assert not [part for part in layers_of(model).parts if part.name.startswith("blocks.0.")]


def test_a_network_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match=r"^The layers of Linear are unknown"):
        layers_of(torch.nn.Linear(2, 2))
