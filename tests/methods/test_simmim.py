"""SimMIM against its official forward pass, written out, on ViTs, BEiT's networks and Swins."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from timm.models import SwinTransformer
from torch import nn

from ssl_pipeline.backbones import BackboneConfig, TokenBackbone, create_backbone
from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.methods import build_method
from ssl_pipeline.methods.simmim import SimMIM, SimMIMConfig
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer
from ssl_pipeline.schedule import Progress, Schedule
from ssl_pipeline.training.remarks import about_class_token
from tests.methods.toys import assert_same_tensors, descend, train

PROGRESS = Progress(0, 1, 1)
NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 2}),
    "beit": (
        "beit_base_patch16_224",
        {
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "global_pool": "token",
        },
    ),
}


def simmim(network="vit", **changes):
    name, arguments = NETWORKS[network]
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(name=name, arguments={"img_size": 16, "patch_size": 4, **arguments}))
    return SimMIM(SimMIMConfig(name="simmim", **{"mask_size": 8, **changes}), backbone).double()


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("vit_tiny_patch16_224", {}, True),
        ("beit_base_patch16_224", {"global_pool": "token", "use_fc_norm": False}, True),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}, False),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False, "class_token": False}, False),
        ("swin_tiny_patch4_window7_224", {}, False),
    ],
)
def test_a_class_token_that_the_loss_does_not_look_at_is_told(name, arguments, told):
    with torch.device("meta"):
        backbone = create_backbone(BackboneConfig(name=name, arguments=arguments))
    method = SimMIM(SimMIMConfig(name="simmim", mask_size=32), backbone)
    said = about_class_token(method)
    assert (said is not None) == told
    assert said is None or said.startswith(f"the loss of SimMIM is that of the patches, and the features of '{name}'")


def batches(num_steps, *, count=3, seed=0):
    """Images of 16 pixels, three of their four squares of 8 masked."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        images = torch.randn(1, count, 3, 16, 16, generator=generator, dtype=torch.float64)
        squares = torch.rand(1, count, 4, generator=generator).argsort(dim=-1) < 3
        masks = torch.zeros(1, count, 4, 4, dtype=torch.bool)
        for n in range(count):
            for square in range(4):
                row, column = divmod(square, 2)
                masks[0, n, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = squares[0, n, square]
        yield Batch({"image": images}, torch.full((count,), -1), torch.arange(count), {"image": masks.flatten(2)})


def official_loss(model, mask_token, weight, bias, images, masks):
    """The official forward pass for a ViT of 4 x 4 patches of 4 pixels."""
    patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    w = masks.double()[:, :, None]
    x = torch.cat([model.cls_token.expand(len(images), -1, -1), patches * (1 - w) + mask_token * w], dim=1)
    if model.pos_embed is not None:
        x = x + model.pos_embed
    shared = getattr(model, "rel_pos_bias", None)
    for block in model.blocks:
        x = block(x) if shared is None else block(x, shared_rel_pos_bias=shared())
    x = model.norm(x)[:, 1:]
    painted = torch.zeros_like(images)
    for patch in range(16):
        row, column = divmod(patch, 4)
        pixels = x[:, patch] @ weight[:, :, 0, 0].T + bias  # channel, row, column: what PixelShuffle(4) takes
        painted[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = pixels.view(-1, 3, 4, 4)
    of_pixels = masks.view(-1, 4, 4).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, None].double()
    return ((images - painted).abs() * of_pixels).sum() / (of_pixels.sum() + 1e-5) / 3


@pytest.mark.parametrize("network", NETWORKS)
def test_ten_steps_follow_the_official_code(network):
    method = simmim(network)
    model, token = deepcopy(method.encoder.model), nn.Parameter(method.mask_token.detach().clone())
    convolution, losses = deepcopy(method.decoder[0]), []
    whole = nn.ModuleList([model, convolution, nn.ParameterList([token])])
    for batch in batches(10):
        images, masks = batch.views["image"][0], batch.masks["image"][0]
        loss = official_loss(model, token, convolution.weight, convolution.bias, images, masks)
        whole.zero_grad()
        loss.backward()
        descend(whole, lr=0.1)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, batches(10), lr=0.1), torch.stack(losses))
    assert_same_tensors(method.encoder.model, model)
    assert_same_tensors(method.decoder[0], convolution)
    torch.testing.assert_close(method.mask_token, token)
    assert losses[-1] < losses[0]


def test_what_is_masked_is_not_seen():
    method, (batch,) = simmim(), batches(1)
    seen = []
    method.encoder.model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch.views["image"].requires_grad_()
    method(batch, Progress(0, 1, 1))
    (gradient,) = torch.autograd.grad(seen[0].square().sum(), batch.views["image"])
    touched = gradient[0].abs().sum(dim=1).unflatten(2, (4, 4)).unflatten(1, (4, 4)).sum(dim=(2, 4)).flatten(1) > 0
    assert torch.equal(touched, ~batch.masks["image"][0])


def test_a_swin_is_masked_in_its_small_patches_and_paints_with_its_last():
    model = SwinTransformer(32, num_classes=0, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    method = SimMIM(SimMIMConfig(name="simmim", mask_size=8), TokenBackbone(model))
    (rule,) = (views.mask for views in method.needs)
    assert (rule.patch_size, rule.unit, method.encoder.stride, method.mask_token.numel()) == (4, 2, 8, 8)
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    masks[:, :, :4] = True
    images = torch.randn(1, 2, 3, 32, 32)
    output = method(Batch({"image": images}, torch.zeros(2), torch.arange(2), {"image": masks.flatten(2)}), PROGRESS)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    optimizer = build_optimizer(method, OptimConfig(name="adamw", lr=Schedule(value=1e-3)))
    decays = {id(p): group["decays"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in method.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(("mask_token", "relative_position_bias_table"))
        assert decays[id(parameter)] != spared, name


def test_a_collapse_shows():
    method, (batch,) = simmim(), batches(1)
    spread = method(batch, PROGRESS).metrics["feature_std"]
    batch.views["image"][:], batch.masks["image"][:] = batch.views["image"][:, :1], batch.masks["image"][:, :1]
    assert spread > 0.01
    assert method(batch, PROGRESS).metrics["feature_std"] < 1e-6


def test_the_defaults_are_the_official_ones():
    config = SimMIMConfig(name="simmim")
    assert (config.mask_ratio, config.mask_size) == (0.6, 32)


def test_class_token_and_positions_are_spared_weight_decay_and_the_mask_token_is_not():
    method = simmim()
    optimizer = build_optimizer(method, OptimConfig(name="adamw", lr=Schedule(value=1e-3)))
    decays = {id(p): group["decays"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in method.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(("cls_token", "pos_embed"))
        assert decays[id(parameter)] != spared, name


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_cnn_is_refused(name):
    with torch.device("meta"), pytest.raises(ConfigError, match=rf"^SimMIM needs a backbone .* '{name}' has none\."):
        SimMIM(SimMIMConfig(name="simmim"), create_backbone(BackboneConfig(name=name)))


def test_weights_behind_the_pooling_of_a_beit_are_refused_with_its_own_setting():
    with torch.device("meta"), pytest.raises(ConfigError, match=r"fc_norm there; set .*\"use_fc_norm\": false\}'\.$"):
        SimMIM(SimMIMConfig(name="simmim"), create_backbone(BackboneConfig(name="beit_base_patch16_224")))


def test_a_square_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ConfigError, match=r"multiple of the backbone's patch size 4\. Got 10; try 8\.$"):
        simmim(mask_size=10)


@pytest.mark.parametrize(("network", "size", "sentence"), [("vit", 20, "mask_size, 8. Got 20"), ("beit", 32, "own")])
def test_images_that_do_not_fit_are_refused(network, size, sentence):
    with pytest.raises(ConfigError, match=sentence):
        simmim(network).prepare(RunFacts(100, None, 8, {"image": (size,)}, (0.5,) * 3, (0.5,) * 3))


# the recipe


def test_the_recipe_makes_the_steps_of_the_official_code_on_16_processes():
    config = load(PretrainConfig, ["recipe=simmim_vitb16"], recipes=RECIPES)
    lr = config.optim.effective_lr(16 * config.data.batch_size)
    rates = {epoch: lr(Progress(epoch * 10, 8000, 10)) for epoch in (0, 10, 699, 700, 799)}
    assert (16 * config.data.batch_size, config.train.epochs, config.optim.clip_norm) == (2048, 800, 5.0)
    assert rates == pytest.approx({0: 2e-6, 10: 4e-4, 699: 4e-4, 700: 4e-5, 799: 4e-5})
    assert (config.optim.weight_decay.value, config.optim.betas) == (0.05, (0.9, 0.999))
    view = config.augment["image"]
    assert (view.size, view.scale, view.interpolation, view.flip_prob) == (224, (0.67, 1.0), "bilinear", 0.5)


def test_the_recipe_has_the_official_network():
    config = load(PretrainConfig, ["recipe=simmim_vitb16"], recipes=RECIPES)
    with torch.device("meta"):
        method = build_method(config.method, create_backbone(config.backbone))
    model = method.encoder.model
    assert model.pos_embed is None
    assert model.rel_pos_bias.relative_position_bias_table.shape == (27 * 27 + 3, 12)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    decoder = 768 * 768 + 768
    of_block = 12 * 768**2 + 768 * (2 + 1 + 4 + 1 + 4 + 2)  # matrices; biases, norms and scales
    expected = 12 * of_block + 732 * 12 + 768 * (768 + 1) + 2 * 768 + 2 * 768 + decoder
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == expected


# first weights


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_first_weights_are_cut_at_one_deviation(name):
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(name=name, arguments=arguments, initial_weights="beit"))
    model, cut = backbone.model, 0.02
    deviation = cut * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2)))
    for number, block in enumerate(model.blocks, start=1):
        for layer, scale in (
            (block.attn.qkv, 1),
            (block.mlp.fc1, 1),
            (block.attn.proj, number),
            (block.mlp.fc2, number),
        ):
            weight = layer.weight * (math.sqrt(2 * scale) if layer in (block.attn.proj, block.mlp.fc2) else 1)
            assert weight.abs().max() <= cut * (1 + 1e-6)
            assert weight.std().item() == pytest.approx(deviation, rel=0.03)
    assert not model.blocks[0].mlp.fc1.bias.any()
    assert 0 < model.cls_token.abs().max() <= cut
