"""SoftMatch (Chen et al., 2023, https://arxiv.org/abs/2301.10921)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ssl_pipeline.batch import RunFacts
from ssl_pipeline.methods.weak_to_strong import WeakToStrong, WeakToStrongConfig
from ssl_pipeline.modules.pseudo_labels import GaussianWeights


class SoftMatchConfig(WeakToStrongConfig):
    """SoftMatch: FixMatch in which every guess counts, the less the further its confidence lies below the mean."""

    name: Literal["softmatch"]
    statistics_momentum: float = Field(0.999, ge=0, lt=1)
    """Share of the moving mean and variance of the confidence that an update keeps."""
    num_sigmas: float = Field(2.0, gt=0, le=1000)
    """By how many standard deviations the weights fall to exp(-1/2): of the variance / num_sigmas^2."""


class SoftMatch(WeakToStrong):
    """It keeps the moving mean and variance of the confidence, and the mean prediction."""

    config_class = SoftMatchConfig
    config: SoftMatchConfig
    coupled_by = "the distribution of classes"

    def prepare(self, facts: RunFacts) -> None:
        config, num_classes = self.config, self.learn_classes(facts)
        self.weighting = GaussianWeights(num_classes, momentum=config.statistics_momentum, num_sigmas=config.num_sigmas)
