"""ReMixMatch (Berthelot et al., 2019, https://arxiv.org/abs/1911.09785)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.backbones import Backbone
from ssl_pipeline.batch import Batch, RunFacts, Views
from ssl_pipeline.config import InRange
from ssl_pipeline.distributed import mean_over_ranks, rank
from ssl_pipeline.losses import align_distribution, sharpen, weighted_cross_entropy
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import FewLabels, FewLabelsConfig
from ssl_pipeline.modules.batch_mixing import as_targets, mixup_global_batch
from ssl_pipeline.modules.classifier import accuracy
from ssl_pipeline.modules.memory import MovingDistribution, RecentDistribution
from ssl_pipeline.modules.running_statistics import kept_statistics
from ssl_pipeline.schedule import Duration, Progress, Schedule

TURNS = 4


class ReMixMatchConfig(FewLabelsConfig):
    """ReMixMatch: MixMatch with aligned guesses of weak views for strong ones, and rotations to recognise."""

    name: Literal["remixmatch"]
    temperature: float = Field(0.5, gt=0, le=1)
    """Temperature that the aligned guess is sharpened with."""
    mixup_alpha: float = Field(0.75, gt=0, le=1000)
    """Beta(alpha, alpha) of the shares, one for each row."""
    labelled_view: Literal["strong", "weak"] = "strong"
    """Which view of a labelled image is learnt from (USB: weak)."""
    distribution_window: int = Field(128, ge=1, le=2**20)
    """Batches over which predictions are averaged to align guesses."""
    class_momentum: float = Field(0.999, ge=0, lt=1)
    """Share of the moving mean of the labels, which guesses are aligned to, that an update keeps."""
    unlabelled_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(value=1.5, warmup=Duration("1.5625%"))
    """Weight of the loss on all mixed unlabelled views."""
    unmixed_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(value=0.5, warmup=Duration("1.5625%"))
    """Weight of the loss on the first strong view before mixing."""
    rotation_weight: float = Field(0.5, ge=0)
    """Weight of predicting the rotation of the first strong view (40 labels: 2)."""


class ReMixMatch(FewLabels):
    """It adds three terms to the loss on labels: on mixed, on unmixed and on turned unlabelled images.

    Guesses, unmixed and turned views go through in passes by batch statistics that leave the running ones. Images are
    mixed over the global batch: k micro-batches are not one big batch here.
    """

    config_class = ReMixMatchConfig
    config: ReMixMatchConfig
    coupled_by = "the distribution of classes, and what images are mixed with"

    def __init__(self, config: ReMixMatchConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.needs = (
            Views("weak", count=1, evaluated=True),
            Views("strong"),
            Views(config.labelled_view, count=None if config.labelled_view == "strong" else 1, labelled=True),
        )
        self.rotation = nn.Linear(backbone.embed_dim, TURNS)

    def prepare(self, facts: RunFacts) -> None:
        num_classes = self.learn_classes(facts)
        self.classes = MovingDistribution(num_classes, momentum=self.config.class_momentum)
        self.predictions = RecentDistribution(num_classes, window=self.config.distribution_window)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        assert batch.labelled is not None
        config, weak, strong = self.config, batch.one("weak"), batch.views["strong"]
        guessed, predictions = self._guess(weak)
        labels = as_targets(batch.labelled.labels, guessed.shape[1], dtype=guessed.dtype)
        images, (labelled_targets, *targets) = mixup_global_batch(
            [batch.labelled.views[config.labelled_view][0], *strong, weak],
            [labels, *[guessed] * (len(strong) + 1)],
            alpha=config.mixup_alpha,
        )
        features, (labelled, *mixed) = self.pair(*images)
        turned, turns = quarter_turns(strong[0])
        with kept_statistics(self.pair.student):
            more, (unmixed, _) = self.pair(strong[0], turned)
        rotation_loss = weighted_cross_entropy(self.rotation(more[len(weak) :]), turns)
        loss = weighted_cross_entropy(labelled, labelled_targets) + config.rotation_weight * rotation_loss
        mixed_loss = weighted_cross_entropy(torch.cat(mixed), torch.cat(targets))
        loss = loss + config.unlabelled_weight(progress) * mixed_loss
        loss = loss + config.unmixed_weight(progress) * weighted_cross_entropy(unmixed, guessed)
        metrics = {
            "unlabelled_loss": mixed_loss.detach(),
            "rotation_loss": rotation_loss.detach(),
            "guess_confidence": guessed.amax(dim=1).mean(),
            "guess_right": accuracy(guessed, batch.labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        carry = {"classes": mean_over_ranks(labels.mean(dim=0)), "predictions": predictions}
        return StepOutput(loss, metrics, carry)

    @torch.no_grad()
    def _guess(self, weak: Tensor) -> tuple[Tensor, Tensor]:
        """(U, C): the predictions aligned, then sharpened; and (C,) the mean of the predictions of all processes."""
        with kept_statistics(self.pair.student):
            _, (logits,) = self.pair(weak)
        probabilities = logits.softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
        aligned = align_distribution(probabilities, self.classes.value, self.predictions.value)
        return sharpen(aligned, temperature=self.config.temperature), mean_over_ranks(probabilities.mean(dim=0))

    @torch.no_grad()
    def after_step(self, carries: Sequence[dict[str, Tensor]], progress: Progress) -> None:
        self.classes.update(torch.stack([carry["classes"] for carry in carries]).mean(dim=0))
        self.predictions.update(torch.stack([carry["predictions"] for carry in carries]).mean(dim=0))
        super().after_step(carries, progress)


def quarter_turns(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, C, S, S), the i-th of the global batch turned by i mod 4 quarters; and (B,) by how many."""
    first = rank() * len(images)
    turned = images.clone()
    for turn in range(1, TURNS):
        rows = slice((turn - first) % TURNS, None, TURNS)
        turned[rows] = images[rows].rot90(turn, dims=(-2, -1))
    return turned, (first + torch.arange(len(images), device=images.device)) % TURNS
