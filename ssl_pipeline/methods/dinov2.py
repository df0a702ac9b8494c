"""DINOv2 (Oquab et al., 2023, https://arxiv.org/abs/2304.07193)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Depth, InRange
from ssl_pipeline.losses import sinkhorn_targets
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.masked_tokens import MaskedPatches, stratified_blocks, with_class_token
from ssl_pipeline.modules.memory import Centre
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.modules.token_distillation import (
    Comparison,
    check_batch,
    compare,
    koleo_of_large_crops,
    rules_of,
    update_centres,
)
from ssl_pipeline.modules.token_distillation_config import TokenDistillationConfig
from ssl_pipeline.modules.token_heads import TokenHeads, token_heads
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Duration, Momentum, Progress, Schedule


class DINOv2Config(TokenDistillationConfig):
    """DINOv2: iBOT with half of the large crops masked, and class tokens that keep their distance from each other."""

    name: Literal["dinov2"]
    patch_head: Literal["shared", "separate"] = "shared"
    """Whether patches have a head of their own (`ibot.separate_head` of the official code)."""
    patch_head_layers: Depth | None = None
    """Linear layers of a patch head of its own; null: as the class head's."""
    fixed_prototype_scale: bool = False
    """Whether all prototypes have length 1; the official code trains their lengths."""
    teacher_temperature: Annotated[Schedule, InRange(gt=0)] = Schedule(
        value=0.07, start=0.04, warmup=Duration("30ep"), inclusive=True
    )
    """Temperature of the teacher's softmax, or of Sinkhorn-Knopp."""
    teacher_momentum: Momentum = Schedule(value=0.992, final=1.0)
    """Share of the teacher that an update keeps."""
    centring: Literal["centring", "sinkhorn_knopp"] = "centring"
    """How the teacher's outputs are spread over the prototypes (`train.centering`)."""
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the centres that an update keeps."""
    layer_decay: float = Field(0.9, gt=0, le=1)
    """Factor on the learning rate from each block to the one before it."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> DINOv2Config:
        own = ("num_patch_prototypes", "patch_head_hidden", "patch_head_bottleneck", "patch_head_layers")
        for setting in own if self.patch_head == "shared" else ():
            if getattr(self, setting) is not None:
                raise ValueError(
                    f"{setting} has no effect with patch_head=shared. Leave it out, or set patch_head=separate."
                )
        return self


class DINOv2(Method):
    """Student and teacher with heads for class tokens and patches; a centre for each, unless Sinkhorn-Knopp is used.

    Images are assigned, and neighbours are looked for, over the global batch. With accumulation that is the micro-batch
    of all processes: k micro-batches are not one big batch here.
    """

    config_class = DINOv2Config
    coupled_by = "the assignment of images to prototypes, and KoLeo's neighbours"

    def __init__(self, config: DINOv2Config, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        with_tokens = with_class_token(backbone, "DINOv2")
        heads = token_heads(
            config,
            with_tokens.embed_dim,
            shared=config.patch_head == "shared",
            patch_layers=config.patch_head_layers,
            fixed_scale=config.fixed_prototype_scale,
        )
        self.student: Encoder[TokenHeads] = Encoder(with_tokens, heads)
        self.teacher = Teacher(self.student)
        self.mask_token = nn.Parameter(torch.zeros(1, with_tokens.patch_dim))  # zeros, as the official code
        if config.centring == "centring":
            self.centre = Centre(config.num_prototypes)
            self.patch_centre = Centre(config.num_patch_prototypes or config.num_prototypes)
        mask = stratified_blocks(with_tokens, config)
        self.needs = (Views("global", mask=mask), Views("local", optional=True))

    def backbones(self) -> dict[str, Backbone]:
        # the teacher first: what the official evaluation loads
        return {"teacher": self.teacher.network.backbone, "student": self.student.backbone}

    def prepare(self, facts: RunFacts) -> None:
        check_batch(
            facts,
            num_neighbours=1 if self.config.koleo_weight else 0,
            per_process=self.config.koleo_per_process,
            sinkhorn=self.config.centring == "sinkhorn_knopp",
        )

    def _centres(self) -> tuple[Centre | None, Centre | None]:
        return (self.centre, self.patch_centre) if self.config.centring == "centring" else (None, None)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        config, temperature = self.config, self.config.teacher_temperature(progress)
        how = Comparison(
            is_logged=progress.is_logged,
            student_temperature=config.student_temperature,
            temperatures=(temperature, temperature),
            centres=self._centres(),
            assign=partial(sinkhorn_targets, num_iterations=config.sinkhorn_iterations),
        )
        masked = MaskedPatches.of(batch)
        found = compare(self.student, self.teacher.network, batch, masked, how, mask_token=self.mask_token)
        loss = config.class_weight * found.class_loss + config.patch_weight * found.patch_loss
        metrics = found.metrics | {"feature_std": feature_std(found.teacher.classes, progress)}
        if config.koleo_weight:
            koleo = koleo_of_large_crops(found, batch, per_process=config.koleo_per_process)
            loss = loss + config.koleo_weight * koleo
            metrics["koleo"] = koleo.detach()
        return StepOutput(loss, metrics, found.carry)

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        update_centres(self._centres(), carries, momenta=(self.config.centre_momentum, self.config.centre_momentum))
        self.teacher.update(self.student, self.config.teacher_momentum(progress))

    def param_rules(self) -> tuple[ParamRule, ...]:
        return rules_of(self.student, self.config)
