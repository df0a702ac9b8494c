"""DINOv2 against its equations, written out; its passes, masks, learning rates, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.backbones import layer_lr_scale
from ssl_pipeline.batch import RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.losses import prototype_targets, prototypes
from ssl_pipeline.methods.dinov2 import DINOv2, DINOv2Config
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer
from ssl_pipeline.schedule import Duration, Progress, Schedule
from tests.losses.test_prototypes import Sizes
from tests.methods.token_distillation import (
    Plain,
    batches,
    class_loss,
    logits,
    patch_loss,
    sinkhorn,
    token_method,
    tokens,
    unit,
)
from tests.methods.toys import train
from tests.tiny import CNN, VIT

SMALL = {"num_prototypes": 9, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
TEMPERATURE = Schedule(value=0.3, start=0.15, warmup=Duration(4), inclusive=True)
SINKHORN = {"centring": "sinkhorn_knopp"}
SEPARATE = {"patch_head": "separate", "num_patch_prototypes": 7, "patch_head_hidden": 12, "patch_head_bottleneck": 6}


def dinov2(backbone=VIT, **changes):
    settings = SMALL | {"teacher_temperature": TEMPERATURE} | changes
    return token_method(DINOv2, DINOv2Config(name="dinov2", **settings), backbone)


def koleo(rows):
    """With the nearest other row of each."""
    rows = unit(rows)
    terms = []
    for i, row in enumerate(rows):
        nearest = max((j for j in range(len(rows)) if j != i), key=lambda j: (row @ rows[j]).item())
        terms.append(-((row - rows[nearest]).norm() + 1e-8).log())
    return sum(terms) / len(terms)


def loss_of(method):
    """The objective of DINOv2, and its centres."""
    config = method.config

    def loss(plain, batch, progress):
        large, small, mask = batch.views["global"], batch.views["local"], batch.masks["global"].flatten(0, 1)
        num_images, temperature = large.shape[1], config.teacher_temperature(progress)
        heads = [(network[1].classes, network[1].patches or network[1].classes) for network in networks(plain)]
        with torch.no_grad():
            classes, patches = tokens(plain.teacher[0], large.flatten(0, 1))
            seen = [logits(heads[1][0], classes), logits(heads[1][1], patches[mask])]
            if config.centring == "sinkhorn_knopp":
                targets = [sinkhorn(of, temperature) for of in seen]
            else:
                given = zip(seen, plain.centres, strict=True)
                targets = [((of - centre) / temperature).softmax(dim=-1) for of, centre in given]
                momentum = config.centre_momentum
                plain.centres = [
                    momentum * centre + (1 - momentum) * of.mean(dim=0)  # of patches the masked ones alone
                    for of, centre in zip(seen, plain.centres, strict=True)
                ]
            of_all = torch.zeros(*mask.shape, targets[1].shape[1], dtype=torch.float64)
            of_all[mask] = targets[1]
        classes, patches = tokens(plain.student[0], large.flatten(0, 1), mask, plain.mask_token)
        of_small, _ = tokens(plain.student[0], small.flatten(0, 1))
        student = logits(heads[0][0], torch.cat([classes, of_small])) / config.student_temperature
        of_classes = class_loss(targets[0].unflatten(0, (-1, num_images)), student.unflatten(0, (-1, num_images)))
        of_patches = patch_loss(of_all, logits(heads[0][1], patches) / config.student_temperature, mask)
        spread = sum(koleo(crop) for crop in classes.unflatten(0, (-1, num_images)))
        return config.class_weight * of_classes + config.patch_weight * of_patches + config.koleo_weight * spread

    return loss


def networks(plain):
    return plain.student, plain.teacher


@pytest.mark.parametrize(
    "settings",
    [
        {"centre_momentum": 0.7},
        SEPARATE | {"class_weight": 0.5, "patch_weight": 2.0, "koleo_weight": 0.3},
        SINKHORN,
        SINKHORN | SEPARATE | {"fixed_prototype_scale": True, "koleo_weight": 0.0},
    ],
)
def test_ten_steps_follow_the_equations(monkeypatch, settings):
    monkeypatch.setattr(prototypes, "SLAB", 4)
    monkeypatch.setattr(prototype_targets, "SLAB", 5)
    method, given = dinov2(**settings), batches("dinov2", 10)
    plain = Plain(method)
    expected = plain.train(method, given, loss_of(method), lr=0.1)
    actual = train(method, given, lr=0.1)
    assert_close(actual, expected, rtol=1e-8, atol=1e-10)
    assert actual[-1] != actual[0]
    teacher = [*method.teacher.network.backbone.model.parameters(), *method.teacher.network.head.parameters()]
    assert_close(teacher, list(plain.teacher.parameters()), rtol=1e-7, atol=1e-9)
    assert_close(method.mask_token, plain.mask_token, rtol=1e-7, atol=1e-9)
    assert_close([centre.value for centre in method._centres() if centre], plain.centres, rtol=1e-7, atol=1e-9)


def test_a_step_goes_once_through_each_network_for_each_resolution():
    method, (batch,) = dinov2(**SEPARATE), batches("dinov2", 1)
    passes = {"student": [], "teacher": []}
    for name, backbone in method.backbones().items():
        backbone.model.blocks[0].register_forward_hook(
            lambda _, inputs, __, own=passes[name]: own.append(len(inputs[0]))
        )
    rows = []
    for head in (method.student.head, method.teacher.network.head):
        head.patches.mlp.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    method(batch, Progress(0, 10, 5))
    assert passes == {"student": [8, 12], "teacher": [8]}  # two large, three small crops of four images
    assert rows == [int(batch.masks["global"].sum())] * 2  # the heads see masked patches alone


def test_the_defaults_are_the_official_ones():
    config = DINOv2Config(name="dinov2")
    assert (config.num_prototypes, config.head_hidden_dim, config.head_bottleneck_dim) == (65536, 2048, 256)
    assert (config.class_weight, config.patch_weight, config.koleo_weight) == (1.0, 1.0, 0.1)
    assert (config.layer_decay, config.patch_embed_lr_scale, config.centring) == (0.9, 0.2, "centring")
    temperatures = [config.teacher_temperature(Progress(step, 1000, 10)) for step in (0, 299, 300)]
    assert temperatures == pytest.approx([0.04, 0.07, 0.07])


def test_masks_are_stratified_blocks_of_at_most_half_the_grid():
    rule = dinov2(VIT.model_copy(update={"arguments": {"img_size": 56, "patch_size": 4}})).needs[0].mask
    assert (rule.kind, rule.stratified, rule.probability, rule.ratio) == ("blocks", True, 0.5, (0.1, 0.5))
    assert (rule.min_block, rule.max_block, rule.min_aspect) == (4, 98, 0.3)


def test_learning_rates_shrink_towards_the_input_and_tokens_are_decayed():
    deep = VIT.model_copy(update={"arguments": {**VIT.arguments, "depth": 3, "reg_tokens": 2, "init_values": 1e-5}})
    method = dinov2(deep, layer_decay=0.5, patch_embed_lr_scale=0.2)
    optimizer = build_optimizer(method, OptimConfig(name="adamw", lr=Schedule(value=1.0)))
    scales = {
        id(parameter): (group["rule"].lr_scale, group["decays"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in method.student.backbone.model.named_parameters():
        scale = layer_lr_scale(name, num_blocks=3, decay=0.5, patch_embed_scale=0.2)
        matrix = parameter.ndim > 1 and not name.endswith(".bias")
        assert scales[id(parameter)] == (pytest.approx(scale), matrix), name
    assert scales[id(method.mask_token)] == (0.5**4, True)
    assert scales[id(method.student.backbone.model.reg_token)] == (0.5**4, True)
    assert scales[id(method.student.head.classes.mlp[0].weight)] == (1.0, True)
    assert {rule.prefix for rule in method.param_rules() if rule.frozen_for != 0} == {
        "student.head.classes.last_layer."
    }


def test_a_collapse_shows():
    method, (batch,) = dinov2(**SINKHORN), batches("dinov2", 1)
    spread = method(batch, Progress(0, 10, 5)).metrics
    for views in batch.views.values():
        views[:] = views[:1, :1]  # all images the same: only uniform codes are balanced
    collapsed = method(batch, Progress(0, 10, 5)).metrics
    assert collapsed["target_entropy"].item() == pytest.approx(math.log(9))
    assert spread["target_entropy"] < math.log(9) - 0.01
    assert collapsed["feature_std"] < 1e-6 < spread["feature_std"]
    assert collapsed["koleo"] > spread["koleo"] + 10


def facts(global_batch, micro_batch=None):
    return RunFacts(100, None, global_batch, {"global": (16,)}, (0.5,) * 3, (0.5,) * 3, micro_batch=micro_batch)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {},
            r"^KoLeo looks for the nearest other image, so it needs at least 2 at once\. Got 1; raise data\.batch",
        ),
        ({"koleo_per_process": True}, r"^KoLeo .* at once in each process\. Got 1"),
        (SINKHORN | {"koleo_weight": 0.0}, r"^Sinkhorn-Knopp .* needs at least 2 images at once\. Got 1; raise"),
    ],
)
def test_a_batch_of_one_image_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        dinov2(**settings).prepare(facts(1))
    with pytest.raises(ConfigError, match=sentence):
        dinov2(**settings).prepare(facts(4, micro_batch=1))
    dinov2(**settings).prepare(facts(2))
    dinov2(koleo_weight=0.0).prepare(facts(1))


@pytest.mark.parametrize(
    ("backbone", "sentence"),
    [
        (
            CNN,
            r"^DINOv2 needs a backbone with patch tokens and a class token\. 'test_resnet' does not have both",
        ),
        (
            VIT.model_copy(
                update={"arguments": {**VIT.arguments, "class_token": False, "global_pool": "avg", "fc_norm": False}}
            ),
            r"^DINOv2 needs a backbone with patch tokens and a class token",
        ),
    ],
)
def test_a_backbone_without_what_it_needs_is_refused(backbone, sentence):
    with pytest.raises(ConfigError, match=sentence):
        dinov2(backbone)


def test_blocks_whose_smallest_is_larger_than_their_largest_are_refused():
    with pytest.raises(ConfigError, match=r"^method\.mask_min_block=5 is larger than method\.mask_max_block=4"):
        dinov2(mask_min_block=5, mask_max_block=4)


@pytest.mark.parametrize("setting", ["num_patch_prototypes", "patch_head_hidden", "patch_head_layers"])
def test_settings_of_a_patch_head_that_is_not_there_are_refused(setting):
    with pytest.raises(ValueError, match=rf"{setting} has no effect with patch_head=shared"):
        DINOv2Config(name="dinov2", **{setting: 7})


def recipe(name):
    return load(PretrainConfig, [f"recipe={name}"], recipes=RECIPES)


@pytest.mark.parametrize(
    ("name", "batch", "steps", "lr", "warmup", "momentum", "prototypes"),
    [
        ("dinov2_vitl16_short", 2048, 125_000, 0.004 * 2**0.5, 12_500, 0.992, 65536),
        ("dinov2_vits14", 3072, 625_000, 2e-4 * 3**0.5, 100_000, 0.994, 131072),
    ],
)
def test_the_recipes_have_the_official_numbers(name, batch, steps, lr, warmup, momentum, prototypes):
    config = recipe(name)
    schedule = config.optim.effective_lr(batch)
    assert batch % config.data.batch_size == 0
    assert (config.train.steps, schedule.warmup, config.method.num_prototypes) == (steps, warmup, prototypes)
    assert (schedule.value, schedule.final) == (pytest.approx(lr), 1e-6)
    assert config.method.teacher_momentum.value == momentum
    assert [group.count for group in config.augment.values()] == [2, 8]
    assert config.method.koleo_per_process
    decays = [config.optim.weight_decay(Progress(step, steps, 1)) for step in (0, steps // 2, steps)]
    assert all(before < after for before, after in pairwise(decays))


@pytest.mark.parametrize("centring", ["centring", "sinkhorn_knopp"])
def test_logits_are_never_whole(monkeypatch, centring):
    monkeypatch.setattr(prototypes, "SLAB", 64)
    monkeypatch.setattr(prototype_targets, "SLAB", 64)
    method, (batch,) = dinov2(num_prototypes=4096, centring=centring), batches("dinov2", 1)
    with Sizes() as sizes:
        method(batch, Progress(0, 10, 5)).loss.backward()
    assert sizes.largest == 4096 * 8  # the prototypes; the logits of 20 class tokens alone are 10 * 8 * 1024
