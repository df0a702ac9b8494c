"""MAE patch by patch, its first weights, and the backbones that it cannot train."""

import math
from dataclasses import replace

import pytest
import torch

from ssl_pipeline.backbones import BackboneConfig, create_backbone
from ssl_pipeline.backbones.patches import random_masking, take_patches
from ssl_pipeline.backbones.positions import sincos_position_embedding
from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.config import ConfigError
from ssl_pipeline.losses import mae_loss
from ssl_pipeline.methods.mae import MAE, MAEConfig
from ssl_pipeline.schedule import Progress

TINY_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
PROGRESS = Progress(0, 1, 1)


def tiny_vit(**changes):
    arguments = TINY_VIT | changes.pop("arguments", {})
    torch.manual_seed(0)
    return create_backbone(BackboneConfig(name="vit_tiny_patch16_224", arguments=arguments, **changes))


def mae(backbone=None, **changes):
    settings = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2} | changes
    return MAE(MAEConfig(name="mae", **settings), backbone or tiny_vit(initial_weights="mae", fixed_positions=True))


NOISE = torch.rand(3, 16, generator=torch.Generator().manual_seed(5))
MASKS = NOISE.argsort(dim=1).argsort(dim=1) >= 4  # the four patches of smallest noise are kept


def image_batch(size=16, count=3):
    images = torch.randn(1, count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Batch({"image": images}, torch.full((count,), -1), torch.arange(count), {"image": MASKS[None]})


def patch_of(image, number):
    row, column = divmod(number, 4)
    return image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]


@torch.no_grad()
def loss_patch_by_patch(method, images, noise, normalize_targets):
    """The official forward pass, one image and one patch at a time."""
    model, decoder = method.encoder.model, method.decoder
    errors = []
    for image, noise_of_image in zip(images, noise, strict=True):
        order = sorted(range(16), key=lambda patch: noise_of_image[patch])
        kept, removed = order[:4], order[4:]
        tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
        for patch in kept:
            weight = model.patch_embed.proj.weight.flatten(1)
            tokens.append(weight @ patch_of(image, patch).flatten() + model.patch_embed.proj.bias)
            tokens[-1] = tokens[-1] + model.pos_embed[0, 1 + patch]
        encoded = model.norm(model.blocks(torch.stack(tokens)[None]))
        embedded = decoder.embed(encoded)[0]
        positions = sincos_position_embedding(16, (4, 4), class_token=True)
        sequence = [embedded[0] + positions[0]]
        for patch in range(16):
            token = embedded[1 + kept.index(patch)] if patch in kept else decoder.mask_token[0, 0]
            sequence.append(token + positions[1 + patch])
        decoded = decoder.predict(decoder.norm(decoder.blocks(torch.stack(sequence)[None])))[0, 1:]
        for patch in removed:
            target = patch_of(image, patch).permute(1, 2, 0).flatten()  # row, column, channel
            if normalize_targets:
                variance = (target - target.mean()).square().sum() / (len(target) - 1)
                target = (target - target.mean()) / (variance + 1e-6).sqrt()
            errors.append((decoded[patch] - target).square().mean())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("normalize_targets", [True, False])
def test_the_loss_equals_that_of_single_patches(normalize_targets):
    method, batch = mae(normalize_targets=normalize_targets), image_batch()
    output = method(batch, PROGRESS)
    expected = loss_patch_by_patch(method, batch.views["image"][0], NOISE, normalize_targets)
    torch.testing.assert_close(output.loss, expected)


def test_the_value_is_that_of_the_public_loss_on_all_patches():
    method, batch = mae().double(), image_batch()
    images = batch.views["image"][0].double()
    output = method(replace(batch, views={"image": images[None]}), PROGRESS)
    kept, mask, restore = random_masking(NOISE, ratio=0.75)
    encoded = method.encoder.encode(take_patches(method.encoder.embed(images), kept))
    expected = mae_loss(images, method.decoder(encoded, restore), mask, patch_size=4, normalize_targets=True)
    torch.testing.assert_close(output.loss, expected)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(output.loss, trained), torch.autograd.grad(expected, trained))


def test_the_mask_is_the_samples_own():
    method, batch = mae(), image_batch()
    loss = method(batch, PROGRESS).loss
    assert torch.equal(method(batch, PROGRESS).loss, loss)  # nothing is drawn in a step
    other = replace(batch, masks={"image": MASKS.flip(1)[None]})
    assert not torch.equal(method(other, PROGRESS).loss, loss)


def test_only_kept_patches_are_embedded_and_only_removed_ones_predicted():
    method, shapes = mae(), []
    method.encoder.model.patch_embed.norm.register_forward_hook(lambda *call: shapes.append(call[2].shape[1]))
    method.decoder.predict.register_forward_hook(lambda *call: shapes.append(call[2].shape[1]))
    method(image_batch(), PROGRESS)
    assert shapes == [4, 12]


def test_the_encoder_sees_a_quarter_of_the_patches():
    method, lengths = mae(), []
    method.encoder.model.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    method(image_batch(), PROGRESS)
    assert lengths == [1 + 4]


def test_the_removed_pixels_matter_to_the_target_alone():
    method, batch = mae(), image_batch()
    batch.views["image"].requires_grad_()
    seen = []
    method.encoder.model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method(batch, PROGRESS)
    (gradient,) = torch.autograd.grad(seen[0].square().sum(), batch.views["image"])
    for image, noise in zip(gradient[0], NOISE, strict=True):
        touched = {patch for patch in range(16) if patch_of(image, patch).any()}
        assert touched == set(noise.argsort()[:4].tolist())


def test_every_trained_parameter_gets_a_gradient_and_the_positions_none():
    method = mae()
    method(image_batch(), PROGRESS).loss.backward()
    without = {name for name, parameter in method.named_parameters() if parameter.grad is None}
    assert without == {"encoder.model.pos_embed"}
    assert not method.encoder.model.pos_embed.requires_grad


def test_registers_and_a_missing_class_token_are_no_obstacle():
    for arguments in ({"reg_tokens": 2}, {"class_token": False, "global_pool": "avg", "fc_norm": False}):
        method = mae(tiny_vit(arguments=arguments))
        method(image_batch(), PROGRESS).loss.backward()
        assert all(parameter.grad is not None for parameter in method.parameters())


def test_the_evaluated_feature_is_the_class_token_after_the_norm():
    method, images = mae(), image_batch().views["image"][0]
    method.eval()
    encoded = method.encoder.encode(method.encoder.embed(images))
    torch.testing.assert_close(method.encoder(images), encoded[:, 0])


def test_the_defaults_are_the_published_ones():
    config = MAEConfig(name="mae")
    assert (config.mask_ratio, config.normalize_targets) == (0.75, True)
    assert (config.decoder_dim, config.decoder_depth, config.decoder_heads) == (512, 8, 16)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_cnn_is_refused(name):
    sentence = rf"^MAE needs a backbone with patch tokens \(a ViT\)\. '{name}' has none\. Networks with patch tokens: "
    with torch.device("meta"), pytest.raises(ConfigError, match=sentence):
        mae(create_backbone(BackboneConfig(name=name)))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_network_that_needs_all_patches_is_refused(name):
    with torch.device("meta"), pytest.raises(ConfigError, match=f"^MAE leaves patches out, but '{name}' needs all"):
        mae(create_backbone(BackboneConfig(name=name)))


def test_a_rotating_vit_is_trained_whole():
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    method = mae(create_backbone(BackboneConfig(name="vit_small_patch16_dinov3", arguments=arguments)))
    method(image_batch(), PROGRESS).loss.backward()
    assert all(parameter.grad is not None for parameter in method.parameters() if parameter.requires_grad)


def test_weights_behind_the_pooling_are_refused():
    backbone = tiny_vit(arguments={"global_pool": "avg"})
    with pytest.raises(ConfigError, match=r"'vit_tiny_patch16_224' has fc_norm there; set backbone\.arguments="):
        mae(backbone)


def test_another_image_size_than_the_backbones_is_refused():
    with pytest.raises(ConfigError, match=r"that of the backbone, 4 \* 4 pixels\. Got 32; try .*img_size=32\.$"):
        mae().prepare(RunFacts(100, None, 8, {"image": (32,)}, (0.5,) * 3, (0.5,) * 3))


# first weights


def bound(fan_in, fan_out):
    return math.sqrt(6 / (fan_in + fan_out))


def test_initial_weights_of_mae():
    model = tiny_vit(initial_weights="mae", arguments={"embed_dim": 96}).model
    qkv = model.blocks[0].attn.qkv
    assert qkv.weight.abs().max().item() == pytest.approx(bound(96, 288), rel=0.01)
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound(48, 96), rel=0.01)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not qkv.bias.any()
    assert model.patch_embed.proj.bias.any()  # the official code leaves it to torch


def test_initial_weights_of_moco_v3():
    model = tiny_vit(initial_weights="moco_v3", arguments={"embed_dim": 96}).model
    for weight in model.blocks[1].attn.qkv.weight.chunk(3):
        assert weight.abs().max().item() == pytest.approx(bound(96, 96), rel=0.01)
    assert model.blocks[1].mlp.fc1.weight.abs().max().item() == pytest.approx(bound(96, 384), rel=0.01)
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound(48, 96), rel=0.01)
    assert model.cls_token.abs().max() < 1e-5
    assert not model.patch_embed.proj.bias.any()


@pytest.mark.parametrize("arguments", [{}, {"reg_tokens": 2}, {"no_embed_class": True}])
def test_fixed_positions_are_sines_behind_zeros(arguments):
    table = tiny_vit(fixed_positions=True, arguments=arguments).model.pos_embed
    torch.testing.assert_close(table[0, -16:], sincos_position_embedding(24, (4, 4), class_token=False))
    assert not table[0, :-16].any()


def test_a_frozen_patch_embedding_is_not_trained():
    backbone = tiny_vit(frozen_patch_embed=True)
    untrained = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert untrained == {"model.patch_embed.proj.weight", "model.patch_embed.proj.bias"}


@pytest.mark.parametrize(
    "setting", [{"initial_weights": "moco_v3"}, {"fixed_positions": True}, {"frozen_patch_embed": True}]
)
def test_settings_of_vits_are_refused_elsewhere(setting):
    with torch.device("meta"), pytest.raises(ConfigError, match=r"needs a ViT. 'resnet18' is not one\.$"):
        create_backbone(BackboneConfig(name="resnet18", **setting))


def test_two_sources_of_weights_are_refused():
    with pytest.raises(ValueError, match="Leave one of them out"):
        BackboneConfig(name="vit_tiny_patch16_224", weights="augreg_in21k", initial_weights="mae")


def test_fixed_positions_need_a_table():
    with pytest.raises(ConfigError, match="needs a ViT with a position table"):
        tiny_vit(fixed_positions=True, arguments={"pos_embed": "none"})
