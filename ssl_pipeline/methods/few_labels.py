"""What the methods for labels have in common: one classifier in training, whose moving average is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import RunFacts, Views
from ssl_pipeline.config import Config
from ssl_pipeline.methods.base import Method
from ssl_pipeline.modules.classifier import ClassifierPair
from ssl_pipeline.schedule import Momentum, Progress, Schedule

WEAK = (Views("weak", count=1, evaluated=True), Views("weak", count=1, labelled=True))
TWO_WEAK = (Views("weak", count=2, evaluated=True), Views("weak", count=2, labelled=True))
WEAK_AND_STRONG = (
    Views("weak", count=1, evaluated=True),
    Views("strong", count=1),
    Views("weak", count=1, labelled=True),
)


class FewLabelsConfig(Config):
    """The settings that all of these methods have."""

    name: str
    num_classes: int | None = Field(None, gt=1, le=2**20)
    """Classes of the labelled images; null takes as many as their shards have."""
    teacher_momentum: Momentum = Schedule(value=0.999)
    """Share of the evaluated moving average that an update keeps; 0 evaluates the weights themselves."""


class FewLabels(Method):
    """A backbone with a linear classifier, and its moving average, which is what is evaluated.

    All groups of views go through the network together, so they have one size. buffers: what becomes of the moving
    average's batch-norm statistics, as in Teacher. head_batch_norm: whether batch norm comes before the classifier.
    """

    def __init__(
        self,
        config: FewLabelsConfig,
        backbone: Backbone,
        *,
        buffers: Literal["own", "copy"] = "copy",
        head_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.pair = ClassifierPair(backbone, config.num_classes, buffers=buffers, head_batch_norm=head_batch_norm)

    def prepare(self, facts: RunFacts) -> None:
        self.learn_classes(facts)

    def learn_classes(self, facts: RunFacts) -> int:
        """Make the classifier, if the number of classes was not known before, and return that number.

        Raises ConfigError if settings, labelled images and views do not fit each other.
        """
        one_pass = tuple(dict.fromkeys(views.name for views in self.needs))
        return self.pair.prepare(facts, self.config.num_classes, one_pass=one_pass)

    def backbones(self) -> dict[str, Backbone]:
        return self.pair.backbones()

    @property
    def classifier(self) -> nn.Linear:  # type: ignore[override]
        """The moving average's."""
        return self.pair.classifier

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.pair.update(self.config.teacher_momentum(progress))
