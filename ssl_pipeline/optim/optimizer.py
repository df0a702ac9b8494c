"""Optimizers: parameter groups from rules, and the values that are written into them before every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.config import Config, ConfigError, InRange, MayChange
from ssl_pipeline.optim.lars import LARS
from ssl_pipeline.optim.rules import ParamRule, Trained
from ssl_pipeline.schedule import Duration, Progress, Schedule
from ssl_pipeline.sharded import is_sharded, local_parts, norms


class OptimConfig(Config):
    """The optimizer with its schedules."""

    name: Literal["adamw", "sgd", "lars"]
    """The update rule; LARS is MoCo v3's (decay before the trust ratio, 1-D tensors plain)."""
    lr: MayChange[Annotated[Schedule, InRange(ge=0, le=1000)]]
    """The learning rate, before scaling by the batch."""
    lr_reference_batch: int | None = Field(None, gt=0)
    """The effective lr is lr * global batch / this; null uses lr as it is."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """Whether lr grows with the batch or with its square root."""
    weight_decay: MayChange[Annotated[Schedule, InRange(ge=0, le=100)]] = Schedule(value=0.0)
    """Weight decay; decoupled for AdamW, part of the gradient for SGD and LARS."""
    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """`matrices` spares biases and 1-D tensors (norms); `all` decays every tensor."""
    betas: Annotated[tuple[float, float], InRange(ge=0, lt=1)] = (0.9, 0.999)
    """AdamW's averages."""
    eps: float = Field(1e-8, gt=0, le=1)
    """AdamW's stabiliser."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD and LARS."""
    nesterov: bool = False
    """Nesterov momentum for SGD."""
    trust_coefficient: float = Field(0.001, gt=0)
    """LARS's eta."""
    lr_before_momentum: bool = False
    """Whether LARS's momentum averages steps (SimCLR) instead of directions (MoCo v3)."""
    backbone_lr_scale: float = Field(1.0, ge=0)
    """Factor on the learning rate of the backbone; below 1 for one that starts from weights."""
    freeze_backbone_for: Duration = Duration(0)
    """How long the backbone stays frozen while the heads learn; its batch norm still sees the images."""
    clip_norm: MayChange[float | None] = Field(None, gt=0)
    """The largest gradient norm; null does not clip."""
    clip_each: MayChange[bool] = False
    """Whether `clip_norm` applies to each parameter separately (DINO's official code) instead of to all together."""

    @classmethod
    def of_name(cls, name: str) -> tuple[str, ...]:
        return ("betas", "eps", "nesterov", "trust_coefficient", "lr_before_momentum")

    @model_validator(mode="after")
    def _settings_fit_together(self) -> OptimConfig:
        if self.clip_each and self.clip_norm is None:
            raise ValueError(
                "clip_norm must be a number for clip_each=true, which clips the gradient of each parameter. Got null; "
                "set clip_norm, or clip_each=false."
            )
        if self.freeze_backbone_for.is_whole_run:
            raise ValueError(
                f"freeze_backbone_for={self.freeze_backbone_for} freezes the backbone for the whole run. "
                "Choose a part of it, such as 10%."
            )
        if self.lr_before_momentum and self.name != "lars":
            raise ValueError(f"lr_before_momentum is a setting of LARS. Got name={self.name}; leave it out.")
        return self

    def effective_lr(self, global_batch: int) -> Schedule:
        """The learning-rate schedule at this global batch (images per optimizer step over all processes)."""
        if self.lr_reference_batch is None:
            return self.lr
        ratio = global_batch / self.lr_reference_batch
        return self.lr.times(ratio if self.lr_scaling == "linear" else ratio**0.5)


def build_optimizer(method: Trained, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters of `method`, grouped by the rules that apply to them."""
    rules = (*method.param_rules(), ParamRule(prefix=""))
    groups: dict[tuple[ParamRule, bool], list[nn.Parameter]] = {}
    used = set()
    backbones = tuple(f"{name}." for name, part in method.named_modules() if isinstance(part, Backbone))
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = next(rule for rule in rules if name.startswith(rule.prefix))
        used.add(rule.prefix)
        if name.startswith(backbones):
            rule = _of_backbone(rule, config)
        spared = config.weight_decay_on == "matrices" and (parameter.ndim <= 1 or name.endswith(".bias"))
        groups.setdefault((rule, rule.decays and not spared), []).append(parameter)
    for rule in rules[:-1]:
        if rule.prefix not in used:
            raise ConfigError(f"the rule for parameters '{rule.prefix}*' matches no trainable parameter of the method.")
    param_groups = [
        {"params": parameters, "rule": rule, "decays": decays} for (rule, decays), parameters in groups.items()
    ]
    lr = config.lr.value
    if config.name == "adamw":
        return torch.optim.AdamW(param_groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "sgd":
        sharded = any(is_sharded(parameter) for _, parameter in method.named_parameters())  # no fused SGD for those
        how = {"foreach": True} if sharded else {"fused": True}
        return torch.optim.SGD(param_groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, **how)
    return LARS(
        param_groups,
        lr,
        momentum=config.momentum,
        weight_decay=0.0,
        trust_coefficient=config.trust_coefficient,
        lr_before_momentum=config.lr_before_momentum,
    )


def _of_backbone(rule: ParamRule, config: OptimConfig) -> ParamRule:
    """`rule` with what the settings say of backbones; a rule that freezes for a time of its own keeps that."""
    frozen_for = rule.frozen_for if rule.frozen_for != Duration(0) else config.freeze_backbone_for
    return replace(rule, lr_scale=rule.lr_scale * config.backbone_lr_scale, frozen_for=frozen_for)


def write_values(optimizer: torch.optim.Optimizer, config: OptimConfig, lr: Schedule, progress: Progress) -> float:
    """Write this step's learning rate and weight decay into the groups; returns the learning rate before rules."""
    now = lr(progress)
    weight_decay = config.weight_decay(progress)
    for group in optimizer.param_groups:
        rule: ParamRule = group["rule"]
        group["lr"] = (lr.value if rule.constant_lr else now) * rule.lr_scale
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return now


def prepare_gradients(optimizer: torch.optim.Optimizer, config: OptimConfig, progress: Progress) -> Tensor:
    """Clip the gradients and drop those of frozen parameters; returns the norm of all gradients before clipping.

    Norms are those of whole gradients, wherever the parts of them lie.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms_P = norms(gradients)
    total = torch.linalg.vector_norm(norms_P)
    if config.clip_norm is not None:
        if config.clip_each:
            factors = (config.clip_norm / (norms_P + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(local_parts(gradients), list(factors.unbind()))
        else:
            torch._foreach_mul_(local_parts(gradients), (config.clip_norm / (total + 1e-6)).clamp(max=1.0))
    for group in optimizer.param_groups:
        if group["rule"].is_frozen(progress):
            for parameter in group["params"]:
                parameter.grad = None
    return total
