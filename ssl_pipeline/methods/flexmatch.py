"""FlexMatch (Zhang et al., 2021, https://arxiv.org/abs/2110.08263)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ssl_pipeline.batch import RunFacts
from ssl_pipeline.methods.weak_to_strong import WeakToStrong, WeakToStrongConfig
from ssl_pipeline.modules.pseudo_labels import CurriculumThresholds


class FlexMatchConfig(WeakToStrongConfig):
    """FlexMatch: FixMatch with a threshold for each class, lower for those that are learnt least."""

    name: Literal["flexmatch"]
    threshold: float = Field(0.95, ge=0, le=1)
    """Largest threshold of a class, and what a guess needs to be remembered."""
    threshold_warmup: bool = True
    """Whether images without a remembered guess hold all thresholds down."""


class FlexMatch(WeakToStrong):
    """It remembers the last confident guess of each unlabelled image, by its number in the set."""

    config_class = FlexMatchConfig
    config: FlexMatchConfig

    def prepare(self, facts: RunFacts) -> None:
        config, num_classes = self.config, self.learn_classes(facts)
        self.weighting = CurriculumThresholds(
            facts.num_images, num_classes, threshold=config.threshold, warmup=config.threshold_warmup
        )
