"""A reversible ViT has the gradients of plain autograd, from memory that does not grow with depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from timm.models import create_model
from torch import Tensor, nn

from ssl_pipeline.backbones import (
    BackboneConfig,
    Preprocessing,
    TokenBackbone,
    create_backbone,
    load_backbone,
    save_backbone,
)
from ssl_pipeline.backbones.reversible import MARK, streams_kept
from ssl_pipeline.backbones.weights import load_source
from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import write_tensors
from tests.ranks import run_on_ranks
from tests.test_distributed import method_gradients, relative_gap
from tests.tiny import VIT

REVERSIBLE = VIT.model_copy(update={"reversible": True})
RANDOM = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "init_values": 0.5, "reg_tokens": 2}


def network(depth: int = 3, *, drop_path: float = 0.0, **arguments: object) -> TokenBackbone:
    torch.manual_seed(0)
    all_arguments = VIT.arguments | {"depth": depth} | arguments
    backbone = create_backbone(
        BackboneConfig(name=VIT.name, arguments=all_arguments, drop_path=drop_path, reversible=True)
    )
    assert isinstance(backbone, TokenBackbone)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)  # far from zero, so that blocks do much
    return backbone


def images(*, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)


@contextmanager
def by_autograd(plain: bool) -> Iterator[None]:
    """Inside, the same function is differentiated by autograd if `plain`."""
    with mock.patch("ssl_pipeline.backbones.reversible._Reversible") as replaced:
        replaced.apply.side_effect = lambda blocks, seeds, tokens, *_: streams_kept(blocks, tokens, seeds)[0]
        if plain:
            yield
    if not plain:
        yield


def features_and_gradients(backbone: TokenBackbone, *, plain: bool, seed: int = 3) -> dict[str, Tensor]:
    """By the reversible backward pass, or by autograd through the same function."""
    backbone.zero_grad()
    torch.manual_seed(seed)
    given = images(dtype=next(backbone.parameters()).dtype).requires_grad_()
    with by_autograd(plain):
        features = backbone(given)
    after = torch.rand(3)  # what is drawn later is the same too
    features.square().sum().backward()
    assert given.grad is not None
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, p in backbone.named_parameters() if p.requires_grad}
    return {**gradients, "images": given.grad, "features": features.detach(), "after": after}


@pytest.mark.parametrize("settings", [{}, RANDOM | {"drop_path": 0.4}, {"qk_norm": True, "qkv_bias": False}])
def test_gradients_are_those_of_plain_autograd(settings):
    backbone = network(**settings).double()
    expected = features_and_gradients(backbone, plain=True)
    found = features_and_gradients(backbone, plain=False)
    assert torch.equal(found["features"], expected["features"])
    assert torch.equal(found["after"], expected["after"])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10, msg=name)
    assert not torch.equal(features_and_gradients(backbone, plain=False, seed=4)["after"], found["after"])


def test_frozen_parts_have_no_gradient_and_others_keep_theirs():
    backbone = network().double()
    expected = features_and_gradients(backbone, plain=False)
    backbone.model.blocks[1].requires_grad_(False)
    backbone.model.blocks[2].attn.requires_grad_(False)
    for name, tensor in features_and_gradients(backbone, plain=False).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-10, msg=name)


def test_the_equations_of_a_block():
    backbone, tokens = network(1).double(), torch.randn(2, 5, 24, dtype=torch.float64)
    (block,) = backbone.model.blocks
    first = tokens + block.attn(block.norm1(tokens))
    second = tokens + block.mlp(block.norm2(first))
    torch.testing.assert_close(streams_kept(backbone.model.blocks, tokens, None)[0], (first + second) / 2)


def kept_bytes(backbone: nn.Module) -> int:
    """What a forward pass keeps for its backward pass, beside parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = backbone(images(dtype=torch.float32))
    size = sum(kept.values())
    features.sum().backward()
    return size


def test_memory_does_not_grow_with_depth():
    shallow, deep = kept_bytes(network(2)), kept_bytes(network(12))
    assert deep == shallow
    arguments = VIT.arguments | {"depth": 12}
    assert kept_bytes(create_backbone(BackboneConfig(name=VIT.name, arguments=arguments))) > 10 * deep


def test_under_autocast_the_blocks_are_computed_again_in_the_same_precision():
    backbone, found = network(), []
    for plain in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            backbone.zero_grad()
            with by_autograd(plain):
                features = backbone(images(dtype=torch.float32))
        features.float().square().sum().backward()
        found.append({name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None})
    assert 0 < relative_gap(found[1], found[0]) < 0.02


@pytest.mark.parametrize("name", ["dino", "mae"])
def test_gradients_of_two_processes_are_those_of_one(name):
    expected = method_gradients(name, REVERSIBLE, "")
    first, second = run_on_ranks(method_gradients, name, REVERSIBLE, "")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert relative_gap(first, expected) < 1e-10


def test_inner_blocks_are_the_mean_of_their_streams():
    backbone = network()
    tokens = backbone.tokens(images(dtype=torch.float32), layers=(0, -1))
    torch.testing.assert_close(tokens.layers[1].patches, tokens.patches)
    assert not torch.allclose(tokens.layers[0].patches, tokens.patches)
    torch.testing.assert_close(backbone.tokens(images(dtype=torch.float32)).patches, tokens.patches)


@pytest.mark.slow
def test_a_compiled_backbone_computes_the_same():
    backbone = network()
    expected = features_and_gradients(backbone, plain=False)
    backbone.compile(dynamic=False)
    for name, tensor in features_and_gradients(backbone, plain=False).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)


# Weights


def test_an_export_comes_back_as_it_was(tmp_path):
    backbone = network().eval()
    save_backbone(tmp_path, backbone, Preprocessing(16, (0.5,) * 3, (0.5,) * 3))
    loaded, _ = load_backbone(tmp_path)
    assert loaded.config.reversible
    given = images(dtype=torch.float32)
    assert torch.equal(loaded.eval()(given), backbone(given))
    with pytest.raises(RuntimeError, match=MARK):  # timm alone would compute something else
        create_model(VIT.name, num_classes=0, **backbone.config.arguments).load_state_dict(loaded.model.state_dict())


def test_weights_of_the_other_function_are_refused(tmp_path):
    ways = {"reversible": REVERSIBLE, "not reversible": VIT}
    for name, config in ways.items():
        write_tensors(tmp_path / f"{name}.safetensors", create_backbone(config).model.state_dict())
    for config, file, hint in (
        (REVERSIBLE, "not reversible", r"misses two_streams.*one stream of tokens"),
        (VIT, "reversible", r"has unknown two_streams.*set backbone\.reversible=true"),
    ):
        with pytest.raises(ConfigError, match=hint):
            load_source(create_backbone(config).model, str(tmp_path / f"{file}.safetensors"), network=None)
        same = next(name for name in ways if name != file)
        load_source(create_backbone(config).model, str(tmp_path / f"{same}.safetensors"), network=None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "swin_tiny_patch4_window7_224"}, r"^backbone\.reversible works only with .*'swin_tiny.*' has none\."),
        (
            {"name": "vit_small_patch16_dinov3"},
            r"^backbone\.reversible works only with the blocks of timm's VisionTransformer",
        ),
        ({"name": "resnet18"}, r"^backbone\.reversible works only with .*'resnet18' has none\."),
        (
            {"weights": "augreg_in21k"},
            r"^backbone\.weights=augreg_in21k are weights of a ViT with one stream of tokens",
        ),
    ],
)
def test_what_cannot_be_reversible_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        create_backbone(BackboneConfig(**({"name": VIT.name, "reversible": True} | settings)))


def test_it_takes_no_checkpointed_activations():
    with pytest.raises(ValueError, match=r"backbone\.reversible and checkpoint_activations both save"):
        BackboneConfig(name=VIT.name, reversible=True, checkpoint_activations=True)
