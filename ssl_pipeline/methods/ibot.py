"""iBOT (Zhou et al., 2021, https://arxiv.org/abs/2111.07832)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone, TokenBackbone
from ssl_pipeline.batch import Batch, MaskRule, Views
from ssl_pipeline.config import Config, Depth, InRange, Width
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import PrototypeHead, WeightNormLinear
from ssl_pipeline.modules.masked_tokens import MaskedPatches, with_class_token
from ssl_pipeline.modules.memory import Centre
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.modules.token_distillation import Comparison, compare, distillation_rules, update_centres
from ssl_pipeline.modules.token_heads import TokenHeads
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Duration, Momentum, Progress, Schedule

WARM_TEMPERATURE = Schedule(value=0.07, start=0.04, warmup=Duration("30ep"), inclusive=True, every="epoch")


class IBOTConfig(Config):
    """iBOT: DINO on class tokens, and the same game with the patches that are hidden from the student."""

    name: Literal["ibot"]
    num_prototypes: int = Field(8192, gt=1)
    """Width of the output that student and teacher agree on for class tokens; with a shared head for patches too."""
    patch_head: Literal["shared", "own_prototypes", "separate"] = "shared"
    """What patches are compared with: the class token's head (`shared_head` of the official code), prototypes of their
    own behind its MLP (the official code without it), or a head of their own."""
    num_patch_prototypes: int | None = Field(None, gt=1)
    """Prototypes for patches where they have their own; null: as many as for class tokens."""
    head_hidden_dim: Width = 2048
    """Width of the heads' hidden layers."""
    head_bottleneck_dim: Width = 256
    """Width of the heads' normalised bottleneck."""
    head_layers: Depth = 3
    """Linear layers before the prototypes."""
    head_batch_norm: bool = False
    """Batch norm in the heads' hidden layers (`norm_in_head: bn` of the official code, which has class tokens and
    patches in one batch; here each have their own)."""
    fixed_prototype_scale: bool = True
    """Whether all prototypes have length 1 (`norm_last_layer` of the official code; false for its ViT-S)."""
    freeze_prototypes_for: Duration = Duration("1ep")
    """How long the student's last layer stays as it was initialised."""
    student_temperature: float = Field(0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temperature: Annotated[Schedule, InRange(gt=0)] = WARM_TEMPERATURE
    """Temperature of the teacher's softmax for class tokens."""
    patch_teacher_temperature: Annotated[Schedule, InRange(gt=0)] = WARM_TEMPERATURE
    """Temperature of the teacher's softmax for patches; `delay` it where masking starts later."""
    teacher_momentum: Momentum = Schedule(value=0.996, final=1.0)
    """Share of the teacher that an update keeps."""
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the class tokens' centre that an update keeps."""
    patch_centre_momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the patches' centre that an update keeps."""
    class_weight: float = Field(1.0, ge=0)
    """Weight of the class tokens' loss (`lambda1`)."""
    patch_weight: float = Field(1.0, ge=0)
    """Weight of the patches' loss (`lambda2`)."""
    masks: Literal["blocks", "random"] = "blocks"
    """Whether patches are masked in rectangles or one by one (`pred_shape`)."""
    mask_probability: float = Field(0.5, ge=0, le=1)
    """Share of the large crops that have a mask; the official `pred_ratio: 0 0.3` is one in two."""
    mask_ratio: Annotated[tuple[float, float], InRange(ge=0, lt=1, increasing=True)] = (0.1, 0.5)
    """Smallest and largest share of masked patches of a crop that has a mask, .3 +- .2 in the official code."""
    mask_min_block: int | None = Field(None, ge=1)
    """Smallest area of a block in patches; null: a ninth of the backbone's grid, as the official code."""
    masking_starts: Duration = Duration(0)
    """When masking begins (`pred_start_epoch`)."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> IBOTConfig:
        if self.patch_head == "shared" and self.num_patch_prototypes is not None:
            raise ValueError(
                "num_patch_prototypes has no effect with patch_head=shared. Leave it out, or set "
                "patch_head=own_prototypes."
            )
        if self.masks == "random" and self.mask_min_block is not None:
            raise ValueError("mask_min_block has no effect with masks=random. Leave it out.")
        return self


class IBOT(Method):
    """Student and teacher with heads for class tokens and patches, a centre for each, and the student's mask token."""

    config_class = IBOTConfig

    def __init__(self, config: IBOTConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        with_tokens = with_class_token(backbone, "iBOT")
        self.student: Encoder[TokenHeads] = Encoder(with_tokens, _heads(config, with_tokens))
        self.teacher = Teacher(self.student)
        self.mask_token = nn.Parameter(torch.zeros(1, with_tokens.patch_dim))  # zeros, as the official code
        self.centre = Centre(config.num_prototypes)
        self.patch_centre = Centre(config.num_patch_prototypes or config.num_prototypes)
        self.needs = (Views("global", mask=_mask_rule(config, with_tokens)), Views("local", optional=True))

    def backbones(self) -> dict[str, Backbone]:
        # the teacher first: what the official evaluation loads
        return {"teacher": self.teacher.network.backbone, "student": self.student.backbone}

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        config = self.config
        masked = MaskedPatches.of(batch, masking=progress.step >= config.masking_starts.steps(progress))
        how = Comparison(
            is_logged=progress.is_logged,
            student_temperature=config.student_temperature,
            temperatures=(config.teacher_temperature(progress), config.patch_teacher_temperature(progress)),
            centres=(self.centre, self.patch_centre),
            all_patches=True,
        )
        found = compare(self.student, self.teacher.network, batch, masked, how, mask_token=self.mask_token)
        loss = config.class_weight * found.class_loss + config.patch_weight * found.patch_loss
        return StepOutput(
            loss, found.metrics | {"feature_std": feature_std(found.teacher.classes, progress)}, found.carry
        )

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        momenta = (self.config.centre_momentum, self.config.patch_centre_momentum)
        update_centres((self.centre, self.patch_centre), carries, momenta=momenta)
        self.teacher.update(self.student, self.config.teacher_momentum(progress))

    def param_rules(self) -> tuple[ParamRule, ...]:
        return distillation_rules(self.student, frozen_for=self.config.freeze_prototypes_for)


def _heads(config: IBOTConfig, backbone: TokenBackbone) -> TokenHeads:
    num_patch_prototypes = config.num_patch_prototypes or config.num_prototypes

    def head(num_prototypes: int) -> PrototypeHead:
        return PrototypeHead(
            backbone.embed_dim,
            num_prototypes,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
            num_layers=config.head_layers,
            batch_norm=config.head_batch_norm,
            fixed_scale=config.fixed_prototype_scale,
        )

    patches: PrototypeHead | WeightNormLinear | None = None
    classes = head(config.num_prototypes)
    if config.patch_head == "separate":
        patches = head(num_patch_prototypes)
    elif config.patch_head == "own_prototypes":
        fixed = config.fixed_prototype_scale
        patches = WeightNormLinear(config.head_bottleneck_dim, num_patch_prototypes, fixed_scale=fixed)
    return TokenHeads(classes, patches)


def _mask_rule(config: IBOTConfig, backbone: TokenBackbone) -> MaskRule:
    ratio, probability = config.mask_ratio, config.mask_probability
    if config.masks == "random":
        return MaskRule("random", backbone.patch_size, ratio=ratio, probability=probability)
    min_block = config.mask_min_block or max(1, min(backbone.grid) // 3) ** 2
    return MaskRule("blocks", backbone.patch_size, ratio=ratio, probability=probability, min_block=min_block)
