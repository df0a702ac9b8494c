"""FreeMatch (Wang et al., 2022, https://arxiv.org/abs/2205.07246)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.config import InRange
from ssl_pipeline.losses import fairness_loss
from ssl_pipeline.methods.base import StepOutput
from ssl_pipeline.methods.weak_to_strong import WeakToStrong, WeakToStrongConfig
from ssl_pipeline.modules.pseudo_labels import SelfAdaptiveThresholds
from ssl_pipeline.schedule import Progress


class FreeMatchConfig(WeakToStrongConfig):
    """FreeMatch: FixMatch with thresholds for each class that follow the confidence, and a fairness term."""

    name: Literal["freematch"]
    statistics_momentum: float = Field(0.999, ge=0, lt=1)
    """Share of the moving means of confidence and predictions that an update keeps."""
    fairness_weight: float = Field(0.01, ge=0)
    """Weight of the fairness term (TorchSSL; USB's files: 0.001)."""
    threshold_limits: Annotated[tuple[float, float], InRange(ge=0, le=1, increasing=True)] | None = None
    """What the thresholds are clamped to; [0.9, 0.95] for SVHN."""


class FreeMatch(WeakToStrong):
    """It keeps moving means of the confidence, of the predictions and of the guesses."""

    config_class = FreeMatchConfig
    config: FreeMatchConfig
    weighting: SelfAdaptiveThresholds
    coupled_by = "the fairness of classes"

    def prepare(self, facts: RunFacts) -> None:
        config, num_classes = self.config, self.learn_classes(facts)
        self.weighting = SelfAdaptiveThresholds(
            num_classes, momentum=config.statistics_momentum, limits=config.threshold_limits
        )

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        step = self.guess(batch, progress)
        carry, weighting = step.labels.carry, self.weighting
        predictions = weighting.predictions.after(carry["predictions"])
        guesses = weighting.guesses.after(carry["guesses"])
        fairness = fairness_loss(step.strong, step.labels.weights, predictions, guesses)
        loss = step.loss + self.config.fairness_weight * fairness
        return StepOutput(loss, {**step.metrics, "fairness": fairness.detach()}, carry)
