"""The contract between a method and the training loop.

A method is a network with its loss. It says which views it needs; `forward` computes the loss of one micro-batch and
changes nothing; what it finds on the way (keys, teacher means) travels in `StepOutput.carry` to `after_step`, which
updates teachers, queues and centres once per optimizer step. So accumulation, activation checkpointing and a second
evaluation of a batch are right by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import Config
from ssl_pipeline.distributed import mean_over_ranks, world_size
from ssl_pipeline.optim.rules import ParamRule
from ssl_pipeline.schedule import Progress


@dataclass(frozen=True)
class StepOutput:
    """The loss of one micro-batch; metrics (scalars) and carry are detached."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A network with its loss: `forward` computes, `after_step` updates what is not trained.

    A method is made from its config and a backbone. Before the run begins a recipe is checked against `needs`, so
    `forward` trusts the batch that it gets.
    """

    config_class: ClassVar[type[Config]]
    """The settings of the method; `name: Literal[...]` in it is what recipes call the method."""
    needs: tuple[Views, ...]
    """The groups of views that forward reads; in the class where they are fixed, else set by `__init__`."""
    projected: ClassVar[tuple[str, ...]] = ()
    """Trained parameters that `after_step` may change, by name: SwAV's prototypes, which it puts on the sphere."""

    coupled_by: ClassVar[str] = ""
    """What in the loss ties the images of a micro-batch together, in words, batch norm aside; empty where it is a mean
    over images, so that k micro-batches are one big batch."""

    classifier: nn.Linear | None = None
    """Features (B, D) of `backbone` -> (B, classes), where a method learns to classify; evaluated with it."""

    reads_class_token: ClassVar[bool] = True
    """Whether the loss looks at the class token of a ViT that has one; where not, a run that measures it says so."""

    hardens_labels: bool = False
    """Whether of a soft label (classes,) the likeliest class alone is learnt; a run with soft labels says so."""

    def prepare(self, facts: RunFacts) -> None:
        """Take in what is known of the run; called once, before the optimizer is built.

        The place for buffers with an entry per image and for what depends on the number of classes. Raises ConfigError
        if the settings do not fit the run.
        """

    def backbones(self) -> dict[str, Backbone]:
        """What can be evaluated, by name ("student", "teacher"); the first is exported and evaluated by default."""
        raise NotImplementedError

    @property
    def backbone(self) -> Backbone:
        """The first of `backbones`: (B, C, H, W) -> (B, D)."""
        return next(iter(self.backbones().values()))

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

    def reconstruct(self, batch: Batch) -> Tensor | None:
        """What a method that paints makes of the views (V, B, 3, H, W) of its first group: (V * B, 3, H, W).

        Normalised as the views are; where patches are masked, only these are painted. For people to look at, in eval
        mode and under `torch.no_grad`; None of a method that paints nothing.
        """
        return None

    def export(self, directory: Path) -> None:
        """Write what a finished run leaves next to its backbone; the first process calls it."""

    def param_rules(self) -> tuple[ParamRule, ...]:
        """Exceptions from the optimizer's settings, by parameter name."""
        return ()


@torch.no_grad()
def feature_std(features_BD: Tensor, progress: Progress | None = None) -> Tensor:
    """How far the features of a batch are spread over the sphere: about 1 if evenly, 0 if all are the same (collapse).

    The standard deviation over the batch of the L2-normalised features, averaged over dimensions, times sqrt(D). The
    batch is that of all processes; in a step of which nothing is logged, by `progress`, nothing is sent, and it is that
    of this process.
    """
    unit_BD = nn.functional.normalize(features_BD.float(), dim=-1)
    if world_size() == 1 or (progress is not None and not progress.is_logged):
        return unit_BD.std(dim=0, correction=0).mean() * features_BD.shape[-1] ** 0.5
    mean_D = mean_over_ranks(unit_BD.mean(dim=0))
    variance_D = mean_over_ranks((unit_BD - mean_D).square().mean(dim=0))
    return variance_D.sqrt().mean() * features_BD.shape[-1] ** 0.5
