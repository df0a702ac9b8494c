"""MixMatch (Berthelot et al., 2019, https://arxiv.org/abs/1905.02249)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from ssl_pipeline.batch import Batch, Views
from ssl_pipeline.config import InRange
from ssl_pipeline.losses import guess_labels, mixmatch_loss
from ssl_pipeline.methods.base import StepOutput, feature_std
from ssl_pipeline.methods.few_labels import FewLabels, FewLabelsConfig
from ssl_pipeline.modules.batch_mixing import as_targets, mixup_global_batch
from ssl_pipeline.modules.classifier import accuracy
from ssl_pipeline.modules.running_statistics import kept_statistics
from ssl_pipeline.schedule import Duration, Progress, Schedule


class MixMatchConfig(FewLabelsConfig):
    """MixMatch: labels and sharpened guesses of unlabelled images, all mixed with each other."""

    name: Literal["mixmatch"]
    temperature: float = Field(0.5, gt=0, le=1)
    """Temperature that the mean guess over the views of an image is sharpened with."""
    mixup_alpha: float = Field(0.75, gt=0, le=1000)
    """Beta(alpha, alpha) of the shares."""
    mixup_share: Literal["row", "batch"] = "row"
    """Whether each row draws its share (Google's code) or the batch draws one (USB)."""
    unlabelled_weight: Annotated[Schedule, InRange(ge=0)] = Schedule(value=75.0, warmup=Duration("1.5625%"))
    """Weight of the unlabelled term; rises over 1024 of 65536 kimg."""


class MixMatch(FewLabels):
    """It mixes labelled images with unlabelled ones, and labels with guesses.

    Guesses come from a pass by batch statistics that leaves the running ones; mixed images go through in one pass.
    Images are mixed over the global batch: k micro-batches are not one big batch here.
    """

    config_class = MixMatchConfig
    config: MixMatchConfig
    coupled_by = "what images are mixed with"
    needs = (Views("weak", evaluated=True), Views("weak", labelled=True))

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        assert batch.labelled is not None
        labels, views = batch.labelled.labels, batch.views["weak"]
        with torch.no_grad(), kept_statistics(self.pair.student):
            _, guesses = self.pair(*views)
        guessed = guess_labels(torch.stack(guesses), temperature=self.config.temperature)
        targets = [as_targets(labels, guessed.shape[1], dtype=guessed.dtype), *[guessed] * len(views)]
        images, targets = mixup_global_batch(
            [batch.labelled.views["weak"][0], *views],
            targets,
            alpha=self.config.mixup_alpha,
            per_row=self.config.mixup_share == "row",
        )
        features, (labelled, *unlabelled) = self.pair(*images)
        weight = self.config.unlabelled_weight(progress)
        loss, terms = mixmatch_loss(
            labelled, targets[0], torch.cat(unlabelled), torch.cat(targets[1:]), unlabelled_weight=weight
        )
        metrics = {
            "labelled_loss": terms["labelled"],
            "unlabelled_loss": terms["unlabelled"],
            "guess_confidence": guessed.amax(dim=1).mean(),
            "guess_right": accuracy(guessed, batch.labels),
            "feature_std": feature_std(features.detach(), progress),
        }
        return StepOutput(loss, metrics)
