"""Stochastic depth by leaving images out, against the official blocks of DINOv2 and DINOv3, written out."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import BackboneConfig, TokenBackbone, create_backbone, without_drop_path
from ssl_pipeline.config import ConfigError, SettingsError, load

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
NETWORKS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "layer scale": ("vit_tiny_patch16_224", VIT | {"init_values": 0.3}),
    "dinov3": ("vit_small_patch16_dinov3", VIT | {"global_pool": "token"}),
    "eva02": ("eva02_tiny_patch14_224", VIT | {"global_pool": "token"}),
}
NUM_IMAGES = 5


def network(kind: str, rate: float = 0.4, **settings: object) -> TokenBackbone:
    name, arguments = NETWORKS[kind]
    torch.manual_seed(0)
    config = BackboneConfig(name=name, arguments=arguments, drop_path=rate, drop_path_kind="batch_subset", **settings)
    backbone = create_backbone(config).double()
    assert isinstance(backbone, TokenBackbone)
    for parameter in backbone.parameters():  # norms, biases and scales begin at 0 and 1, which would hide mistakes
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return backbone.train()


def images(count: int = NUM_IMAGES) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def official(backbone: TokenBackbone, pixels: Tensor, rate: float) -> Tensor:
    """block.py of both repositories, for the tokens that enter the first block; returns the class token."""
    model = backbone.model
    entered = list[Tensor]()
    hook = model.blocks[0].register_forward_pre_hook(lambda block, given: entered.append(given[0]))
    with torch.no_grad():
        state = torch.get_rng_state()
        backbone(pixels)
        torch.set_rng_state(state)
    hook.remove()
    tokens = entered[0]
    rope = None if getattr(model, "rope", None) is None else model.rope.get_embed(shape=(4, 4))
    for block in model.blocks:
        first, second = getattr(block, "gamma_1", None), getattr(block, "gamma_2", None)
        for norm, branch, scale, layer_scale in (
            (block.norm1, block.attn, first, getattr(block, "ls1", None)),
            (block.norm2, block.mlp, second, getattr(block, "ls2", None)),
        ):
            kept = torch.randperm(len(tokens))[: max(int(len(tokens) * (1 - rate)), 1)]
            given = {"rope": rope} if branch is block.attn and rope is not None else {}
            added = branch(norm(tokens[kept]), **given)
            added = added if layer_scale is None else layer_scale(added)
            added = added if scale is None else scale * added
            whole = torch.zeros_like(tokens)
            whole[kept] = added * (len(tokens) / len(kept))
            tokens = tokens + whole
    return model.norm(tokens)[:, 0]


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.95])
@pytest.mark.parametrize("kind", NETWORKS)
def test_features_and_gradients_are_the_official_ones(kind: str, rate: float) -> None:
    ours = network(kind, rate)
    theirs = deepcopy(ours)
    torch.manual_seed(2)
    expected = official(theirs, images(), rate)
    torch.manual_seed(2)
    found = ours(images())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for features in (expected, found):
        features.square().sum().backward()
    torch.testing.assert_close(*(gradients(backbone.model.blocks) for backbone in (ours, theirs)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_branch_computes_only_the_images_that_it_is_added_to(kind: str) -> None:
    backbone, seen = network(kind), list[int]()
    for block in backbone.model.blocks:
        for branch in (block.attn, block.mlp):
            branch.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    backbone(images())
    assert seen == [3] * 6  # int(5 * 0.6) of 5 images, in each of the two branches of three blocks
    seen.clear()
    backbone.eval()(images())
    assert seen == [5] * 6


@pytest.mark.parametrize("kind", NETWORKS)
def test_evaluation_and_teachers_leave_nothing_out(kind: str) -> None:
    backbone = network(kind)
    plain = network(kind, 0.0)
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(backbone.state_dict())
    expected = plain(images())
    assert not torch.equal(backbone(images()), expected)
    torch.testing.assert_close(backbone.eval()(images()), expected)
    teacher = deepcopy(backbone).train()
    without_drop_path(teacher)
    torch.testing.assert_close(teacher(images()), expected)


def test_activations_may_be_computed_again() -> None:
    found = []
    for again in (False, True):
        backbone = network("layer scale", checkpoint_activations=again)
        torch.manual_seed(3)
        backbone(images()).square().sum().backward()
        found.append(gradients(backbone.model.blocks))
    torch.testing.assert_close(*found)


def test_a_branch_keeps_nothing_of_what_it_adds() -> None:
    """Beyond what plain blocks keep of 3 of 5 images: the numbers of these images alone."""
    kept = {}
    for rate, count in ((0.0, 3), (0.4, 5)):
        backbone, sizes = network("layer scale", rate), dict[int, int]()
        parameters = {parameter.data_ptr() for parameter in backbone.parameters()}

        def keep(tensor: Tensor, sizes=sizes, parameters=parameters) -> Tensor:
            if tensor.data_ptr() not in parameters:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        blocks = backbone.model.blocks
        tokens = torch.randn(count, 17, 24, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive = blocks(tokens)
        kept[rate] = sum(sizes.values())
        del alive
    copies = 6 * 3 * 17 * 24 * 8  # of the chosen images, which the norm of each branch sees; plain blocks share theirs
    assert kept[0.4] <= kept[0.0] + copies


def test_some_patches_of_an_image_keep_their_own_rotations() -> None:
    backbone = network("dinov3", 0.4)
    tokens = backbone.embed(images())
    places = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(n))[:6] for n in range(5)])
    some = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))
    torch.manual_seed(4)
    together = backbone.encode(some, places)
    torch.manual_seed(4)
    reordered = backbone.encode(some.flip(1), places.flip(1))  # the same patches in another order
    registers = backbone.num_prefix_tokens
    torch.testing.assert_close(reordered[:, registers:].flip(1), together[:, registers:])
    assert (together[0, registers:] - together[1, registers:]).abs().max() > 0


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_other_networks_are_refused(name: str) -> None:
    config = BackboneConfig(name=name, drop_path=0.1, drop_path_kind="batch_subset")
    with torch.device("meta"), pytest.raises(ConfigError, match=rf"VisionTransformer .* and Eva .*'{name}' has others"):
        create_backbone(config)


def test_two_streams_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"takes stochastic depth by image. Set backbone.drop_path_kind=per_image"):
        load(BackboneConfig, ["name=vit_tiny_patch16_224", "reversible=true", "drop_path_kind=batch_subset"])
