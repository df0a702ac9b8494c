"""WRN-28-2 against a reference written with functional calls, and its place in timm's registry."""

import math

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, load_backbone, save_backbone
from ssl_pipeline.backbones.wide_resnet import wide_resnet28_2
from ssl_pipeline.config import ConfigError


@pytest.fixture
def network():
    torch.manual_seed(0)
    return wide_resnet28_2(num_classes=7)


def reference(network, images):
    """The forward pass in evaluation mode from the state dict alone, block by block as the paper's figure 1 has it."""
    state = network.state_dict()

    def convolution(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def active(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-3).sqrt() * weight + bias
        return torch.where(x > 0, x, 0.1 * x)

    x = convolution(images, "stem")
    for block in range(12):
        name, stride = f"blocks.{block}", 2 if block in (4, 8) else 1
        first = active(x, f"{name}.norm1")
        residual = convolution(active(convolution(first, f"{name}.conv1", stride), f"{name}.norm2"), f"{name}.conv2")
        if block in (0, 4, 8):  # the width changes: the shortcut is a 1x1 convolution
            x = convolution(first if block == 0 else x, f"{name}.shortcut", stride)
        x = x + residual
    return active(x, "norm").mean(dim=(2, 3)) @ state["classifier.weight"].T + state["classifier.bias"]


def test_it_computes_what_the_reference_computes(network):
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(0.1 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
    images = torch.randn(2, 3, 16, 16, generator=generator)
    network.eval()
    with torch.no_grad():
        assert_close(network(images), reference(network, images), atol=1e-4, rtol=1e-4)


def test_it_has_28_layers_twice_the_width_and_the_known_size(network):
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert len([layer for layer in convolutions if layer.kernel_size == (3, 3)]) == 1 + 2 * 12
    assert len(convolutions) == 28  # the paper counts the three 1x1 shortcuts and leaves the classifier out
    assert network.num_features == 128
    weights = sum(p.numel() for p in wide_resnet28_2(num_classes=10).parameters() if p.ndim > 1)
    norms = 2 * sum(layer.num_features for layer in network.modules() if isinstance(layer, nn.BatchNorm2d))
    assert weights + norms + 10 == 1_467_610  # the 1.5 M of the paper's table, without biases before batch norms


def test_batch_norm_and_initialisation_are_the_official_ones(network):
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.momentum, layer.eps) == (0.001, 1e-3), name
        if isinstance(layer, nn.Conv2d):
            std = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels))
            tolerance = 5 * std / math.sqrt(2 * layer.weight.numel())
            assert layer.weight.std().item() == pytest.approx(std, abs=tolerance), name
            assert not layer.bias.any(), name
    assert network.classifier.weight.std().item() == pytest.approx(math.sqrt(2 / (128 + 7)), rel=0.1)
    assert not network.classifier.bias.any()


def test_it_is_a_backbone_like_any_other_of_timm(tmp_path):
    config = BackboneConfig(name="wide_resnet28_2", arguments={"batch_norm_momentum": 0.1})
    backbone = create_backbone(config)
    assert backbone.embed_dim == 128
    backbone.eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone(images)
        save_backbone(tmp_path, backbone, Preprocessing(32, (0.5,) * 3, (0.2,) * 3))
        loaded, _ = load_backbone(tmp_path)
        assert loaded.config == config
        assert torch.equal(loaded.eval()(images), features)
    assert features.shape == (2, 128)
    model = timm.create_model("wide_resnet28_2", num_classes=0)
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "backbone.safetensors"))


def test_pretrained_weights_and_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="has no pretrained weights"):
        timm.create_model("wide_resnet28_2", pretrained=True)
    with pytest.raises(ConfigError, match=r"timm cannot create 'wide_resnet28_2' with .*width"):
        create_backbone(BackboneConfig(name="wide_resnet28_2", arguments={"width": 3}))
