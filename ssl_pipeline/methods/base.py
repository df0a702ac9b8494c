"""The contract between a method and the engine.

A method is a network with its loss. `forward` computes the loss of one micro-batch and changes nothing; what it finds
on the way (keys, teacher means) travels in `StepOutput.carry` to `after_step`, which updates teachers, queues and
centres once per optimizer step. So accumulation, activation checkpointing and a second evaluation of a batch are right
by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone, TokenBackbone
from ssl_pipeline.batch import Batch
from ssl_pipeline.config import ConfigError
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Progress


@dataclass(frozen=True)
class StepOutput:
    """The loss of one micro-batch; metrics (scalars) and carry are detached."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A network with its loss: `forward` computes, `after_step` updates what is not trained."""

    view_groups: ClassVar[tuple[str, ...]]
    """Groups of `batch.views` that forward needs."""
    optional_view_groups: ClassVar[tuple[str, ...]] = ()
    """Groups that forward uses where a recipe has them."""
    view_counts: ClassVar[dict[str, int]] = {}
    """How many views of a group forward needs, where the number matters."""
    labelled_view_groups: ClassVar[tuple[str, ...]] = ()
    """The same of `batch.labelled.views`."""

    backbone: nn.Module
    """(B, C, H, W) -> (B, D): what is evaluated and exported; an attribute or a property."""
    classifier: nn.Module | None = None
    """Features (B, D) of `backbone` -> (B, num_classes), where a method learns to classify; evaluated with it."""
    num_classes: int = 0
    """What the labels of `batch.labelled` must lie below, for methods that have some."""

    def check(self, *, global_batch: int) -> None:
        """Raise ConfigError before the first step if the settings do not fit the run.

        global_batch: images per optimizer step, over all processes and micro-batches.
        """

    def check_view_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raise ConfigError before the first step if the backbone cannot take views of these sides in pixels.

        sizes: of each group of views that forward reads.
        """
        patch_size = next((part.patch_size for part in self.modules() if isinstance(part, TokenBackbone)), 1)
        for group, size in sizes.items():
            if size % patch_size:
                nearest = max(1, round(size / patch_size)) * patch_size
                raise ConfigError(
                    f"augment.{group}.size must be a multiple of the backbone's patch size {patch_size}. "
                    f"Got {size}; try {nearest}."
                )

    def parts_to_compile(self) -> list[nn.Module]:
        """The parts whose own `compile` speeds up `forward`: the backbones, and what else takes much of a step."""
        return [part for part in self.modules() if isinstance(part, Backbone)]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """The loss of one micro-batch; changes no parameter and no buffer, batch-norm statistics aside."""
        raise NotImplementedError

    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        """Update teachers, queues and centres after an optimizer step; `carries` has one entry per micro-batch.

        `progress` is that of the step just made. Called under `torch.no_grad`.
        """

    def param_rules(self) -> tuple[ParamRule, ...]:
        """Exceptions from the optimizer's settings, by parameter name."""
        return ()


def two_views(batch: Batch) -> tuple[Tensor, Tensor]:
    """The two views of the group `view`, each (B, C, H, W)."""
    views = batch.views["view"]
    if len(views) != 2:
        raise ConfigError(f"augment.view.count must be 2 for this method. Got {len(views)}.")
    return views[0], views[1]


@torch.no_grad()
def feature_std(features_BD: Tensor) -> Tensor:
    """How far the features of a batch are spread over the sphere: about 1 if evenly, 0 if all are the same (collapse).

    The standard deviation over the batch of the L2-normalised features, averaged over dimensions, times sqrt(D).
    """
    unit = nn.functional.normalize(features_BD.float(), dim=-1)
    return unit.std(dim=0, correction=0).mean() * features_BD.shape[-1] ** 0.5
