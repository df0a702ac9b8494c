"""DINOv3 (Simeoni et al., 2025, https://arxiv.org/abs/2508.10104)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import InRange
from ssl_pipeline.losses import sinkhorn_targets
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.gram_teacher import GramConfig, GramTeacher
from ssl_pipeline.modules.masked_tokens import MaskedPatches, stratified_blocks, with_class_token
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.modules.token_distillation import (
    Comparison,
    check_batch,
    compare,
    koleo_of_large_crops,
    rules_of,
)
from ssl_pipeline.modules.token_distillation_config import TokenDistillationConfig
from ssl_pipeline.modules.token_heads import TokenHeads, token_heads
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Duration, Momentum, Progress, Schedule


class DINOv3Config(TokenDistillationConfig):
    """DINOv3: DINOv2 with schedules that stay, and patches that a Gram teacher keeps as alike as they once were."""

    name: Literal["dinov3"]
    teacher_temperature: Annotated[Schedule, InRange(gt=0)] = Schedule(
        value=0.07, start=0.04, warmup=Duration("10%"), inclusive=True
    )
    """Smoothness of Sinkhorn-Knopp over the teacher's outputs."""
    teacher_momentum: Momentum = Schedule(value=0.994)
    """Share of the teacher that an update keeps."""
    leave_out_same_crop: bool = True
    """Whether a large crop is not compared with itself at the teacher (`global_ignore_diagonal`)."""
    local_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(value=1.0)
    """Weight of the pairs with a small crop within it (`local_loss_weight_schedule`)."""
    koleo_neighbours: int = Field(1, ge=1)
    """Nearest images from which each keeps its distance (`koleo_topk`)."""
    layer_decay: float = Field(0.98, gt=0, le=1)
    """Factor on the learning rate from each block to the one before it."""
    gram: GramConfig | None = None
    """Gram anchoring; null: none, as at the start of the run in the paper."""


class DINOv3(Method):
    """Student and teacher with a head for class tokens and one for patches, and, if asked for, a Gram teacher.

    Images are assigned, and neighbours are looked for, over the global batch. With accumulation that is the micro-batch
    of all processes: k micro-batches are not one big batch here.
    """

    config_class = DINOv3Config
    coupled_by = "the assignment of images to prototypes, and KoLeo's neighbours"

    def __init__(self, config: DINOv3Config, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        with_tokens = with_class_token(backbone, "DINOv3")
        # prototypes are plain linear layers, as in the official code
        heads = token_heads(config, with_tokens.embed_dim, weight_norm=False)
        self.student: Encoder[TokenHeads] = Encoder(with_tokens, heads)
        self.teacher = Teacher(self.student)
        self.mask_token = nn.Parameter(torch.zeros(1, with_tokens.patch_dim))  # zeros, as the official code
        self.gram_teacher = GramTeacher(config.gram, with_tokens) if config.gram is not None else None
        mask = stratified_blocks(with_tokens, config)
        gram = (Views("gram", crops_of="global"),) if config.gram is not None else ()
        self.needs = (Views("global", mask=mask), Views("local", optional=True), *gram)

    def backbones(self) -> dict[str, Backbone]:
        # the teacher first: what is released
        return {"teacher": self.teacher.network.backbone, "student": self.student.backbone}

    def prepare(self, facts: RunFacts) -> None:
        neighbours = self.config.koleo_neighbours if self.config.koleo_weight else 0
        check_batch(facts, num_neighbours=neighbours, per_process=self.config.koleo_per_process, sinkhorn=True)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        config, temperature = self.config, self.config.teacher_temperature(progress)
        how = Comparison(
            is_logged=progress.is_logged,
            student_temperature=config.student_temperature,
            temperatures=(temperature, temperature),
            centres=(None, None),
            assign=partial(sinkhorn_targets, num_iterations=config.sinkhorn_iterations),
            leave_out_same_crop=config.leave_out_same_crop,
            local_weight=config.local_weight(progress),
        )
        masked = MaskedPatches.of(batch)
        found = compare(self.student, self.teacher.network, batch, masked, how, mask_token=self.mask_token)
        loss = config.class_weight * found.class_loss + config.patch_weight * found.patch_loss
        metrics = found.metrics | {"feature_std": feature_std(found.teacher.classes, progress)}
        if config.koleo_weight:
            koleo = koleo_of_large_crops(
                found, batch, num_neighbours=config.koleo_neighbours, per_process=config.koleo_per_process
            )
            loss = loss + config.koleo_weight * koleo
            metrics["koleo"] = koleo.detach()
        if self.gram_teacher is not None:
            gram = self.gram_teacher.loss(found.student.patches, batch, masked, progress)
            loss = loss + self.gram_teacher.config.weight(progress) * gram
            metrics["gram"] = gram.detach()
        return StepOutput(loss, metrics)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.teacher.update(self.student, self.config.teacher_momentum(progress))
        if self.gram_teacher is not None:
            self.gram_teacher.update(self.teacher.network.backbone, progress)

    def param_rules(self) -> tuple[ParamRule, ...]:
        return rules_of(self.student, self.config)
