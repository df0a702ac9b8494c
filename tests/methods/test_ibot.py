"""iBOT against its equations, written out; what it masks, what it shares, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.losses import masked_patch_loss, prototypes, self_distillation
from ssl_pipeline.methods.ibot import IBOT, IBOTConfig
from ssl_pipeline.modules.heads import PrototypeHead
from ssl_pipeline.schedule import Duration, Progress, Schedule
from tests.methods.token_distillation import (
    Plain,
    batches,
    class_loss,
    logits,
    patch_loss,
    token_method,
    tokens,
    unit,
    weights,
)
from tests.methods.toys import train
from tests.tiny import CNN, VIT, make_method

SMALL = {"num_prototypes": 9, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
TEMPERATURES = {
    "teacher_temperature": Schedule(value=0.2, start=0.1, warmup=Duration(4), inclusive=True),
    "patch_teacher_temperature": Schedule(value=0.3, start=0.1, warmup=Duration(3), delay=Duration(2)),
}


def ibot(backbone=VIT, **changes):
    settings = SMALL | TEMPERATURES | {"centre_momentum": 0.7, "patch_centre_momentum": 0.6} | changes
    return token_method(IBOT, IBOTConfig(name="ibot", **settings), backbone)


def patch_logits(head, rows):
    if isinstance(head.patches, PrototypeHead):
        return logits(head.patches, rows)
    last = head.classes.last_layer if head.patches is None else head.patches
    return unit(head.classes.mlp(rows.flatten(0, -2))).unflatten(0, rows.shape[:-1]) @ weights(last).T


def loss_of(method):
    """The equations of iBOT, and its centres."""
    config = method.config

    def loss(plain, batch, progress):
        large, small, mask = batch.views["global"], batch.views["local"], batch.masks["global"].flatten(0, 1)
        if progress.step < config.masking_starts.steps(progress):
            mask = torch.zeros_like(mask)
        with torch.no_grad():
            classes, patches = tokens(plain.teacher[0], large.flatten(0, 1))
            seen = [logits(plain.teacher[1].classes, classes), patch_logits(plain.teacher[1], patches)]
            temperatures = (config.teacher_temperature(progress), config.patch_teacher_temperature(progress))
            targets = [
                ((of - centre) / temperature).softmax(dim=-1)
                for of, centre, temperature in zip(seen, plain.centres, temperatures, strict=True)
            ]
            momenta = (config.centre_momentum, config.patch_centre_momentum)
            for number, (of, momentum) in enumerate(zip(seen, momenta, strict=True)):
                mean = of.flatten(0, -2).mean(dim=0)
                plain.centres[number] = momentum * plain.centres[number] + (1 - momentum) * mean
        classes, patches = tokens(plain.student[0], large.flatten(0, 1), mask, plain.mask_token)
        of_small, _ = tokens(plain.student[0], small.flatten(0, 1))
        student = logits(plain.student[1].classes, torch.cat([classes, of_small])) / config.student_temperature
        num_images = large.shape[1]
        of_classes = class_loss(targets[0].unflatten(0, (-1, num_images)), student.unflatten(0, (-1, num_images)))
        seen = patch_logits(plain.student[1], patches[mask]) / 0.1  # batch norm is of the masked ones alone
        of_patches = patch_loss(
            targets[1], targets[1].new_zeros(targets[1].shape).masked_scatter(mask[..., None], seen), mask
        )
        return config.class_weight * of_classes + config.patch_weight * of_patches

    return loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patch_head": "own_prototypes", "num_patch_prototypes": 7, "fixed_prototype_scale": False},
        {"patch_head": "separate", "num_patch_prototypes": 7, "class_weight": 0.5, "patch_weight": 2.0},
        {"masking_starts": Duration(3)},
        {"head_batch_norm": True},
        {"head_batch_norm": True, "patch_head": "separate"},
    ],
)
def test_ten_steps_follow_the_equations(monkeypatch, settings):
    monkeypatch.setattr(prototypes, "SLAB", 4)
    method, given = ibot(**settings), batches("ibot", 10)
    plain = Plain(method)
    expected = plain.train(method, given, loss_of(method), lr=0.2)
    actual = train(method, given, lr=0.2)
    assert_close(actual, expected, rtol=1e-8, atol=1e-10)
    assert actual[-1] != actual[0]
    assert_close(list(method.student.head.parameters()), list(plain.student[1].parameters()), rtol=1e-7, atol=1e-9)
    teacher = [*method.teacher.network.backbone.model.parameters(), *method.teacher.network.head.parameters()]
    assert_close(teacher, list(plain.teacher.parameters()), rtol=1e-7, atol=1e-9)
    assert_close(method.mask_token, plain.mask_token, rtol=1e-7, atol=1e-9)
    assert_close([method.centre.value, method.patch_centre.value], plain.centres, rtol=1e-7, atol=1e-9)


def test_a_step_is_made_of_the_public_losses():
    method, (batch,) = ibot(), batches("ibot", 1)
    output = method(batch, Progress(0, 10, 5))
    head, mask = method.student.head, batch.masks["global"].flatten(0, 1)
    classes, patches = tokens(method.student.backbone.model, batch.views["global"].flatten(0, 1), mask, 0.0)
    small, _ = tokens(method.student.backbone.model, batch.views["local"].flatten(0, 1))
    with torch.no_grad():
        seen = tokens(method.teacher.network.backbone.model, batch.views["global"].flatten(0, 1))
        targets = [(logits(method.teacher.network.head.classes, of) / 0.1).softmax(dim=-1) for of in seen]
    student = logits(head.classes, torch.cat([classes, small])).unflatten(0, (-1, 4))
    of_classes = self_distillation(student, targets[0].unflatten(0, (-1, 4)), temperature=0.1)
    of_patches = masked_patch_loss(logits(head.classes, patches[mask]), targets[1][mask], mask, temperature=0.1)
    assert_close(output.metrics["class_loss"], of_classes.detach())
    assert_close(output.metrics["patch_loss"], of_patches.detach())
    assert_close(output.loss, of_classes + of_patches)


def test_the_heads_see_masked_patches_alone():
    method, (batch,) = ibot(patch_head="separate"), batches("ibot", 1)
    seen = []
    method.student.head.patches.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    method(batch, Progress(0, 10, 5))
    assert seen == [(int(batch.masks["global"].sum()), 24)]


def test_the_defaults_are_the_official_ones():
    config = IBOTConfig(name="ibot")
    assert (config.num_prototypes, config.head_hidden_dim, config.head_bottleneck_dim) == (8192, 2048, 256)
    assert (config.student_temperature, config.centre_momentum, config.patch_centre_momentum) == (0.1, 0.9, 0.9)
    assert (config.mask_probability, config.mask_ratio, config.masks) == (0.5, (0.1, 0.5), "blocks")
    temperatures = [config.patch_teacher_temperature(Progress(step, 100 * 10, 10)) for step in (0, 9, 290, 900)]
    assert temperatures == pytest.approx([0.04, 0.04, 0.07, 0.07])


def test_masks_are_those_of_the_official_code():
    (views, _), rule = ibot().needs, ibot().needs[0].mask
    assert (views.name, rule.kind, rule.patch_size, rule.ratio) == ("global", "blocks", 4, (0.1, 0.5))
    assert (rule.probability, rule.min_block, rule.max_block, rule.min_aspect) == (0.5, 1, None, 0.3)
    assert ibot(VIT.model_copy(update={"arguments": {"img_size": 56, "patch_size": 4}})).needs[0].mask.min_block == 16
    assert ibot(masks="random").needs[0].mask.kind == "random"


def test_frozen_are_the_prototypes_of_both():
    prefixes = {kind: [rule.prefix for rule in ibot(patch_head=kind).param_rules()] for kind in ("shared", "separate")}
    assert prefixes["shared"] == ["student.head.classes.last_layer."]
    assert prefixes["separate"] == ["student.head.classes.last_layer.", "student.head.patches.last_layer."]
    own = ibot(patch_head="own_prototypes").param_rules()
    assert [rule.prefix for rule in own] == ["student.head.classes.last_layer.", "student.head.patches."]


def test_the_mask_token_is_decayed_and_the_teacher_has_none():
    method = make_method("ibot")
    assert method.mask_token.shape == (1, 24)  # two dimensions: a matrix
    assert not any("mask_token" in name for name, _ in method.teacher.named_parameters())


def test_a_collapse_shows():
    method, (batch,) = ibot(), batches("ibot", 1)
    spread = method(batch, Progress(0, 10, 5)).metrics
    with torch.no_grad():
        for head in (method.student.head, method.teacher.network.head):
            for layer in head.classes.mlp:
                if hasattr(layer, "weight"):
                    layer.weight.zero_()
                    layer.bias.fill_(0.1)
    collapsed = method(batch, Progress(0, 10, 5)).metrics
    assert collapsed.keys() == spread.keys()
    with torch.no_grad():
        for backbone in method.backbones().values():
            backbone.model.norm.weight.zero_()
    assert method(batch, Progress(0, 10, 5)).metrics["feature_std"] < 1e-6 < spread["feature_std"]
    assert 0 < spread["target_entropy"] < math.log(9)


@pytest.mark.parametrize(
    ("backbone", "sentence"),
    [
        (
            CNN,
            r"^iBOT needs a backbone with patch tokens and a class token\. 'test_resnet' does not have both",
        ),
        (
            VIT.model_copy(
                update={"arguments": {**VIT.arguments, "class_token": False, "global_pool": "avg", "fc_norm": False}}
            ),
            r"^iBOT needs a backbone with patch tokens and a class token\. 'vit_tiny_patch16_224' does not",
        ),
        (
            VIT.model_copy(update={"arguments": {**VIT.arguments, "global_pool": "avg"}}),
            r"^iBOT trains a ViT's tokens, not what follows their pooling\. .* has fc_norm there",
        ),
    ],
)
def test_a_backbone_without_what_it_needs_is_refused(backbone, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ibot(backbone)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_patch_prototypes": 7}, "num_patch_prototypes has no effect with patch_head=shared"),
        ({"masks": "random", "mask_min_block": 4}, "mask_min_block has no effect with masks=random"),
    ],
)
def test_settings_without_effect_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        IBOTConfig(name="ibot", **settings)


@pytest.mark.parametrize(
    ("name", "epochs", "scale", "prototype_scale", "lr"),
    [("ibot_vits16", 800, 0.25, False, 2e-3), ("ibot_vitb16", 400, 0.32, True, 2e-3)],
)
def test_the_recipes_have_the_official_numbers(name, epochs, scale, prototype_scale, lr):
    config = load(PretrainConfig, [f"recipe={name}"], recipes=RECIPES)
    assert (16 * config.data.batch_size, config.train.epochs, config.optim.name) == (1024, epochs, "adamw")
    assert config.optim.effective_lr(1024).value == pytest.approx(lr)
    large, small = config.augment["global"], config.augment["local"]
    assert (large.count, large.scale, small.count, small.scale) == (2, (scale, 1.0), 10, (0.05, scale))
    method = config.method
    assert (method.num_prototypes, method.patch_head, method.fixed_prototype_scale) == (8192, "shared", prototype_scale)
