"""FixMatch (Sohn et al., 2020, https://arxiv.org/abs/2001.07685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.config import Config, ConfigError
from ssl_pipeline.losses import fixmatch_loss
from ssl_pipeline.methods.base import Method, StepOutput, feature_std
from ssl_pipeline.modules.teacher import Teacher
from ssl_pipeline.schedule import Progress, Schedule


class FixMatchConfig(Config):
    """FixMatch: what a classifier says with confidence of a weakly augmented image is the label of a strong view."""

    name: Literal["fixmatch"]
    num_classes: int = Field(gt=1)
    """Classes of the labelled images."""
    threshold: float = Field(0.95, ge=0, le=1)
    """Smallest probability of a class that makes it a pseudo-label."""
    unlabelled_weight: float = Field(1.0, ge=0)
    """Weight of the loss on pseudo-labels beside the loss on labels."""
    teacher_momentum: Schedule = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps."""


class FixMatch(Method):
    """A backbone with a linear classifier; its moving average, batch-norm statistics copied, is what is evaluated.

    The moving average takes no part in training. Unlabelled images may come with labels: these serve the metrics alone.
    """

    view_groups = ("weak", "strong")
    labelled_view_groups = ("weak",)

    def __init__(self, config: FixMatchConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        classifier = nn.Linear(backbone.embed_dim, config.num_classes)
        nn.init.xavier_normal_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        self.student = nn.Sequential()
        self.student.add_module("backbone", backbone)
        self.student.add_module("classifier", classifier)
        self.teacher = Teacher(self.student, buffers="copy")

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The moving average's."""
        return self.teacher.network.get_submodule("backbone")

    @property
    def classifier(self) -> nn.Module:  # type: ignore[override]
        """The moving average's."""
        return self.teacher.network.get_submodule("classifier")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        if batch.labelled is None:
            raise ConfigError("FixMatch needs labelled images beside the unlabelled ones. Set data.labelled.")
        images = [
            _only_view(part, name) for part, name in ((batch.labelled, "weak"), (batch, "weak"), (batch, "strong"))
        ]
        self.check_view_sizes({"weak": images[1].shape[-1], "strong": images[2].shape[-1]})
        # one pass, so batch norm sees one distribution
        features = self.student.get_submodule("backbone")(torch.cat(images))
        sizes_of_parts = [len(views) for views in images]
        labelled, weak, strong = self.student.get_submodule("classifier")(features).split(sizes_of_parts)
        loss, kept = fixmatch_loss(
            labelled,
            batch.labelled.labels,
            weak,
            strong,
            threshold=self.config.threshold,
            unlabelled_weight=self.config.unlabelled_weight,
        )
        right = weak.detach().argmax(dim=1) == batch.labels
        metrics = {
            "kept": kept.float().mean(),
            "kept_right": (kept & right).float().mean(),
            "labelled_accuracy": (labelled.detach().argmax(dim=1) == batch.labelled.labels).float().mean(),
            "feature_std": feature_std(features.detach()),
        }
        return StepOutput(loss, metrics)

    def check_view_sizes(self, sizes: Mapping[str, int]) -> None:
        super().check_view_sizes(sizes)
        if sizes["weak"] != sizes["strong"]:
            raise ConfigError(
                f"augment.weak.size and augment.strong.size must be the same. "
                f"Got {sizes['weak']} and {sizes['strong']}."
            )

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.teacher.update(self.student, self.config.teacher_momentum(progress))


def _only_view(batch: Batch, name: str) -> Tensor:
    """(B, C, H, W)."""
    views = batch.views[name]
    if len(views) != 1:
        raise ConfigError(f"augment.{name}.count must be 1 for FixMatch. Got {len(views)}.")
    return views[0]
