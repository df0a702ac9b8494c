"""DINO (Caron et al., 2021, https://arxiv.org/abs/2104.14294)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.config import Config, Depth, InRange, Width
from ssl_pipeline.losses import centred_targets, crop_pairs, prototype_cross_entropy, prototypes_used, total_logits
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.encoder import Encoder
from ssl_pipeline.modules.heads import PrototypeHead
from ssl_pipeline.modules.memory import Centre
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Duration, Momentum, Progress, Schedule


class DINOConfig(Config):
    """DINO: a student sees small and large crops and predicts what its slow-moving teacher says of the large ones."""

    name: Literal["dino"]
    num_prototypes: int = Field(65536, gt=1, le=2**24)
    """Width of the output that student and teacher agree on."""
    head_hidden_dim: Width = 2048
    """Width of the head's hidden layers."""
    head_bottleneck_dim: Width = 256
    """Width of the head's normalised bottleneck."""
    head_layers: Depth = 3
    """Linear layers before the prototypes."""
    head_batch_norm: bool = False
    """Batch norm in the head's hidden layers."""
    fixed_prototype_scale: bool = True
    """Whether all prototypes have length 1 (`norm_last_layer` of the official code)."""
    freeze_prototypes_for: Duration = Duration("1ep")
    """How long the student's last layer stays as it was initialised."""
    student_temperature: float = Field(0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temperature: Annotated[Schedule, InRange(gt=0)] = Schedule(value=0.04)
    """Temperature of the teacher's softmax."""
    teacher_momentum: Momentum = Schedule(value=0.996, final=1.0)
    """Share of the teacher that an update keeps."""
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the centre that an update keeps."""


class DINO(Method):
    """Student and teacher, each a backbone with a prototype head; the teacher's mean output is kept as `centre`."""

    config_class = DINOConfig
    needs = (Views("global"), Views("local", optional=True))

    def __init__(self, config: DINOConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        head = PrototypeHead(
            backbone.embed_dim,
            config.num_prototypes,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
            num_layers=config.head_layers,
            batch_norm=config.head_batch_norm,
            fixed_scale=config.fixed_prototype_scale,
        )
        self.student = Encoder(backbone, head)
        self.teacher = Teacher(self.student)
        self.centre = Centre(config.num_prototypes)

    def backbones(self) -> dict[str, Backbone]:
        # the teacher first: what the official evaluation loads
        return {"teacher": self.teacher.network.backbone, "student": self.student.backbone}

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        global_views = batch.views["global"]
        student, teacher = self.student, self.teacher.network
        with torch.no_grad():
            features = teacher.backbone(global_views.flatten(0, 1))
            teacher_MD, teacher_prototypes = teacher.head.bottleneck(features), teacher.head.prototypes()
        # the backbone once per resolution, the head once for all, as in the official code
        crops = [batch.views[name].flatten(0, 1) for name in ("global", "local") if name in batch.views]
        student_ND = student.head.bottleneck(torch.cat([student.backbone(views) for views in crops]))
        targets = centred_targets(
            teacher_MD, teacher_prototypes, self.centre.value, temperature=self.config.teacher_temperature(progress)
        )
        weights_N, mix_ST = crop_pairs(student_ND, teacher_MD, num_images=global_views.shape[1])
        loss, target_entropy = prototype_cross_entropy(
            student_ND,
            student.head.prototypes(),
            targets,
            weights_N,
            temperature=self.config.student_temperature,
            mix_ST=mix_ST,
        )
        metrics = {"target_entropy": target_entropy, "feature_std": feature_std(features, progress)}
        if progress.is_logged:
            metrics["prototypes_used"] = prototypes_used(targets)
        total_K = total_logits(teacher_MD, teacher_prototypes)
        return StepOutput(loss, metrics, {"total": total_K, "rows": total_K.new_full((), len(teacher_MD))})

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        total_K, num_rows = (torch.stack([carry[name] for carry in carries]).sum(dim=0) for name in ("total", "rows"))
        self.centre.update(total_K, num_rows=num_rows, momentum=self.config.centre_momentum)
        self.teacher.update(self.student, self.config.teacher_momentum(progress))

    def param_rules(self) -> tuple[ParamRule, ...]:
        return (ParamRule("student.head.last_layer.", frozen_for=self.config.freeze_prototypes_for),)
