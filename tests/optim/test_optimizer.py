"""Optimizers: who is decayed, frozen, scaled and clipped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from ssl_pipeline.backbones import Backbone, BackboneConfig, create_backbone, layer_lr_scale
from ssl_pipeline.config import ConfigError
from ssl_pipeline.methods.base import Method
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer, prepare_gradients, write_values
from ssl_pipeline.optim.rules import ParamRule, layer_decay_rules
from ssl_pipeline.schedule import Duration, Progress, Schedule
from tests.backbones.tiny_vit import tiny_vit

START = Progress(0, 100, 10)


class Toy(nn.Module):
    """A token, a norm, two linear layers and something that is not trained."""

    def __init__(self, *rules: ParamRule) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rules = rules
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.backbone = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.fixed = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def param_rules(self) -> tuple[ParamRule, ...]:
        return self.rules


def config(name: str = "sgd", **settings: object) -> OptimConfig:
    return OptimConfig(name=name, **({"lr": Schedule(value=0.1)} | settings))


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict:
    groups = [group for group in optimizer.param_groups if any(parameter is member for member in group["params"])]
    assert len(groups) == 1
    return groups[0]


def fill_gradients(method: Method, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def gradients_of(method: Method) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


# groups


def decayed(method: Method, settings: OptimConfig) -> set[str]:
    optimizer = build_optimizer(method, settings)
    write_values(optimizer, settings, settings.lr, START)
    trained = [(name, parameter) for name, parameter in method.named_parameters() if parameter.requires_grad]
    return {name for name, parameter in trained if group_of(optimizer, parameter)["weight_decay"] == 0.2}


def test_matrices_are_decayed_and_biases_and_norms_spared():
    settings = config(weight_decay=Schedule(value=0.2))
    # the token too: the official DINO decays position embedding and class token
    assert decayed(Toy(), settings) == {"token", "backbone.weight", "head.weight"}


def test_all_decays_every_trained_tensor():
    settings = config(weight_decay=Schedule(value=0.2), weight_decay_on="all")
    everything = {name for name, parameter in Toy().named_parameters() if parameter.requires_grad}
    assert decayed(Toy(), settings) == everything
    assert "norm.bias" in everything


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_each_trained_tensor_is_in_one_group_and_fixed_ones_in_none(name):
    method = Toy(ParamRule("head.", lr_scale=2.0))
    optimizer = build_optimizer(method, config(name))
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(members) == len({id(member) for member in members}) == 7
    assert not any(member is method.fixed for member in members)


def test_the_first_rule_that_fits_applies():
    method = Toy(ParamRule("head.weight", lr_scale=3.0), ParamRule("head.", lr_scale=2.0))
    settings = config()
    optimizer = build_optimizer(method, settings)
    write_values(optimizer, settings, settings.lr, START)
    assert group_of(optimizer, method.head.weight)["lr"] == pytest.approx(0.3)
    assert group_of(optimizer, method.head.bias)["lr"] == pytest.approx(0.2)
    assert group_of(optimizer, method.norm.bias)["lr"] == pytest.approx(0.1)


def test_a_rule_can_spare_weight_decay_but_not_give_it():
    method = Toy(ParamRule("token", decays=False), ParamRule("norm."))
    config = OptimConfig(name="adamw", lr=Schedule(value=1.0), weight_decay=Schedule(value=0.1))
    optimizer = build_optimizer(method, config)
    decays = {id(p): group["decays"] for group in optimizer.param_groups for p in group["params"]}
    assert not decays[id(method.token)]
    assert not decays[id(method.norm.weight)]
    assert decays[id(method.head.weight)]


def test_a_rule_that_fits_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"^the rule for parameters 'tail\.\*' matches no trainable parameter"):
        build_optimizer(Toy(ParamRule("tail.", lr_scale=2.0)), config())
    with pytest.raises(ConfigError, match=r"'fixed\*'"):
        build_optimizer(Toy(ParamRule("fixed")), config())


# layer-wise rates


class WithBackbone(Toy):
    def __init__(self, rules: Callable[[Backbone], tuple[ParamRule, ...]], **changes: object) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"backbone": tiny_vit(**changes)})
        self.rules = (ParamRule("student.backbone.model.norm.", constant_lr=True), *rules(self.student["backbone"]))


@pytest.mark.parametrize("changes", [{}, {"arguments": {"reg_tokens": 2}}, {"frozen_patch_embed": True}])
def test_each_parameter_of_a_vit_has_the_rate_of_its_layer(changes):
    method = WithBackbone(
        lambda backbone: layer_decay_rules(backbone, "student.backbone.", decay=0.5, patch_embed_scale=0.2), **changes
    )
    settings = config("adamw", lr=Schedule(value=1.0))
    optimizer = build_optimizer(method, settings)
    write_values(optimizer, settings, settings.lr, START)
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            inside = name.removeprefix("student.backbone.model.")
            expected = layer_lr_scale(inside, num_blocks=2, decay=0.5, patch_embed_scale=0.2)
            assert group_of(optimizer, parameter)["lr"] == pytest.approx(expected if inside != name else 1.0)


def test_layers_of_the_full_rate_need_no_rule():
    backbone = tiny_vit()
    assert layer_decay_rules(backbone, "", decay=1.0) == ()
    assert layer_decay_rules(backbone, "b.", decay=1.0, patch_embed_scale=0.2) == (
        ParamRule("b.model.patch_embed.", lr_scale=0.2),
    )
    prefixes = [rule.prefix for rule in layer_decay_rules(backbone, "", decay=0.9)]
    assert prefixes == [
        f"model.{part}" for part in ("cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1.")
    ]


def test_a_backbone_can_learn_more_slowly_and_begin_later_than_its_heads():
    method = WithBackbone(lambda backbone: layer_decay_rules(backbone, "student.backbone.", decay=0.5))
    settings = config(backbone_lr_scale=0.1, freeze_backbone_for="1ep")
    optimizer = build_optimizer(method, settings)
    inner = method.student["backbone"].model.blocks[0].attn.qkv.weight
    before, head_before = inner.detach().clone(), method.head.weight.detach().clone()
    for step in range(11):
        progress = Progress(step, 100, 10)
        fill_gradients(method)
        write_values(optimizer, settings, settings.lr, progress)
        prepare_gradients(optimizer, settings, progress)
        optimizer.step()
        assert torch.equal(inner, before) == (step < 10)
    assert not torch.equal(method.head.weight, head_before)
    plain = build_optimizer(method, config())
    write_values(plain, config(), config().lr, START)
    write_values(optimizer, settings, settings.lr, START)
    assert group_of(optimizer, inner)["lr"] == pytest.approx(0.1 * group_of(plain, inner)["lr"])
    assert group_of(optimizer, method.head.weight)["lr"] == group_of(plain, method.head.weight)["lr"]


def test_layer_wise_rates_need_blocks():
    with pytest.raises(ConfigError, match="need one network with blocks"):
        layer_decay_rules(create_backbone(BackboneConfig(name="test_resnet")), "", decay=0.9)


# values of a step


def test_learning_rate_and_decay_follow_their_schedules():
    settings = config(lr=Schedule(value=1.0, final=0.0, warmup=10), weight_decay=Schedule(value=0.04, final=0.4))
    method = Toy()
    optimizer = build_optimizer(method, settings)
    for step, rate, decay in ((0, 0.0, 0.04), (5, 0.5, None), (10, 1.0, None), (55, 0.5, None), (50, None, 0.22)):
        now = write_values(optimizer, settings, settings.lr, Progress(step, 100, 10))
        group = group_of(optimizer, method.head.weight)
        assert now == group["lr"]
        assert rate is None or now == pytest.approx(rate)
        assert decay is None or group["weight_decay"] == pytest.approx(decay)
        assert group_of(optimizer, method.head.bias)["weight_decay"] == 0.0


def test_a_constant_rate_ignores_warmup_and_decay():
    method = Toy(ParamRule("head.", constant_lr=True, lr_scale=0.5))
    settings = config(lr=Schedule(value=0.8, final=0.0, warmup=10))
    optimizer = build_optimizer(method, settings)
    for step in (0, 10, 99):
        write_values(optimizer, settings, settings.lr, Progress(step, 100, 10))
        assert group_of(optimizer, method.head.weight)["lr"] == pytest.approx(0.4)
    assert group_of(optimizer, method.backbone.weight)["lr"] < 0.01


@pytest.mark.parametrize(
    ("settings", "batch", "expected"),
    [
        ({}, 4096, 0.1),
        ({"lr_reference_batch": 256}, 256, 0.1),
        ({"lr_reference_batch": 256}, 4096, 1.6),
        ({"lr_reference_batch": 256}, 64, 0.025),
        ({"lr_reference_batch": 256, "lr_scaling": "sqrt"}, 4096, 0.4),
        ({"lr_reference_batch": 1, "lr_scaling": "sqrt"}, 4096, 6.4),  # SimCLR's 0.075 * sqrt(batch) is of this form
    ],
)
def test_the_effective_rate_grows_with_the_batch(settings, batch, expected):
    lr = config(lr=Schedule(value=0.1, final=1e-6, warmup="10ep"), **settings).effective_lr(batch)
    assert lr.value == pytest.approx(expected)
    assert (lr.final, lr.warmup) == (1e-6, "10ep")


# frozen parameters


def test_a_rule_knows_when_it_ends():
    for duration in (5, Duration(5), "0.5ep", "5%"):
        rule = ParamRule("head.", frozen_for=duration)
        assert [rule.is_frozen(Progress(step, 100, 10)) for step in (0, 4, 5, 99)] == [True, True, False, False]
    assert not ParamRule("head.").is_frozen(START)
    assert ParamRule("head.", frozen_for="1ep") == ParamRule("head.", frozen_for=Duration("1ep"))
    with pytest.raises(ValueError, match="a duration"):
        ParamRule("head.", frozen_for="five steps")


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_frozen_parameters_get_no_update_no_decay_and_no_momentum(name):
    method = Toy(ParamRule("head.", frozen_for="1ep"))
    settings = config(name, weight_decay=Schedule(value=0.5), clip_norm=1.0)
    optimizer = build_optimizer(method, settings)
    before = method.head.weight.detach().clone()
    other = method.backbone.weight.detach().clone()
    for step in range(12):
        progress = Progress(step, 100, 10)
        fill_gradients(method)
        write_values(optimizer, settings, settings.lr, progress)
        prepare_gradients(optimizer, settings, progress)
        optimizer.step()
        if step < 10:
            assert torch.equal(method.head.weight, before)
            assert not optimizer.state.get(method.head.weight)
        if step == 0:
            assert not torch.equal(method.backbone.weight, other)
    assert not torch.equal(method.head.weight, before)
    assert optimizer.state[method.head.weight]


def test_frozen_gradients_count_in_the_norm_as_in_the_official_code():
    # main_dino.py clips first and cancels the last layer's gradients then
    method = Toy(ParamRule("head.", frozen_for=5))
    fill_gradients(method)
    everything = torch.cat([gradient.flatten() for gradient in gradients_of(method).values()]).norm()
    assert_close(prepare_gradients(build_optimizer(method, config()), config(), START), everything)


# clipping


def test_clipping_each_parameter_is_the_official_dino_rule():
    method = Toy()
    fill_gradients(method)
    method.norm.weight.grad *= 1e-3  # below the limit
    settings = config(clip_norm=1.5, clip_each=True)
    before = gradients_of(method)
    expected = {}
    for name, gradient in before.items():
        coefficient = 1.5 / (gradient.norm(2) + 1e-6)
        expected[name] = gradient * coefficient if coefficient < 1 else gradient
    total = prepare_gradients(build_optimizer(method, settings), settings, START)
    after = gradients_of(method)
    assert_close(after, expected)
    assert torch.equal(after["norm.weight"], before["norm.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert_close(total, torch.cat([gradient.flatten() for gradient in before.values()]).norm())


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_clipping_all_is_torch_clip_grad_norm(scale):
    ours, theirs = Toy(), Toy()
    fill_gradients(ours, scale)
    fill_gradients(theirs, scale)
    settings = config(clip_norm=0.7)
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
    assert_close(prepare_gradients(build_optimizer(ours, settings), settings, START), norm)
    assert_close(gradients_of(ours), gradients_of(theirs))


def test_without_limit_gradients_stay():
    method = Toy()
    fill_gradients(method, 100.0)
    before = gradients_of(method)
    prepare_gradients(build_optimizer(method, config()), config(), START)
    assert_close(gradients_of(method), before, rtol=0, atol=0)


@pytest.mark.parametrize("clip_each", [False, True])
def test_a_gradient_that_is_not_finite_is_seen_in_the_norm(clip_each):
    method = Toy()
    settings = config(clip_norm=1.0, clip_each=clip_each)
    fill_gradients(method)
    method.head.bias.grad[0] = float("nan")
    assert prepare_gradients(build_optimizer(method, settings), settings, START).isnan()


# the update rules


def test_adamw_steps_as_torch_does_with_the_values_of_the_step():
    ours, theirs = Toy(), Toy()
    settings = config("adamw", betas=(0.9, 0.95), eps=1e-6, weight_decay=Schedule(value=0.3), weight_decay_on="all")
    optimizer = build_optimizer(ours, settings)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    reference = torch.optim.AdamW(trained, lr=0.1, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.3)
    for _ in range(3):
        fill_gradients(ours)
        fill_gradients(theirs)
        write_values(optimizer, settings, settings.lr, START)
        optimizer.step()
        reference.step()
    assert_close(ours.state_dict(), theirs.state_dict())


def test_sgd_has_momentum_nesterov_and_coupled_decay():
    method = Toy()
    settings = config(momentum=0.9, nesterov=True, weight_decay=Schedule(value=0.3))
    optimizer = build_optimizer(method, settings)
    weight, velocity = method.head.weight.detach().clone(), torch.zeros(3, 4)
    for _ in range(3):
        fill_gradients(method)
        gradient = method.head.weight.grad + 0.3 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * (gradient + 0.9 * velocity)
        write_values(optimizer, settings, settings.lr, START)
        optimizer.step()
    assert_close(method.head.weight.detach(), weight)


def test_lars_of_a_recipe_can_take_the_rate_before_its_momentum():
    optimizers = [build_optimizer(Toy(), config("lars", lr_before_momentum=first)) for first in (False, True)]
    assert [optimizer.param_groups[0]["lr_before_momentum"] for optimizer in optimizers] == [False, True]
    with pytest.raises(ValidationError, match="lr_before_momentum is a setting of LARS"):
        config("sgd", lr_before_momentum=True)


# settings


def test_clip_each_needs_a_norm():
    with pytest.raises(ValidationError, match="clip_norm must be a number for clip_each=true"):
        config(clip_each=True)


@pytest.mark.parametrize("settings", [{"clip_norm": 0.0}, {"eps": 0.0}, {"momentum": 1.0}, {"lr_reference_batch": 0}])
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValidationError):
        config(**settings)


def test_a_backbone_is_not_frozen_for_the_whole_run():
    settings = {"name": "sgd", "lr": {"value": 0.1}, "freeze_backbone_for": "100%"}
    with pytest.raises(ValueError, match=r"freeze_backbone_for=100% freezes the backbone"):
        OptimConfig(**settings)
