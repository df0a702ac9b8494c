"""What is measured during training besides k-NN: the accuracy of a method's own classifier, the spectrum of
features."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from ssl_pipeline.augment.central_crop import Interpolation
from ssl_pipeline.config import BatchSize, Config, ConfigError
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.shards.origins import display_name
from ssl_pipeline.eval.accuracy import top_k_accuracy
from ssl_pipeline.eval.features.extract import Extraction, eval_mode
from ssl_pipeline.eval.labelled import (
    classes_of,
    evenly_spread,
    look_at_first,
    say,
    shared_warnings,
)
from ssl_pipeline.eval.spectra import FEWEST_EIGENVALUES, alpha_req, rankme
from ssl_pipeline.schedule import Duration, Progress


class MonitorConfig(Config):
    """When a monitor measures, and what happens to the run when it cannot."""

    every: Duration
    """How often: `5ep`, `10%` or a number of optimizer steps; 0: only at the end, when it is measured in any case."""
    at_start: bool | None = None
    """Whether it measures before the first step too, as a row of step 0; by default where the backbone starts from
    weights."""
    on_error: Literal["skip", "stop"] = "skip"
    """What happens when it fails during training: `skip` says so in one line, the row says why, and training goes on;
    `stop` ends the run, which is saved before. Images whose header shows that they cannot be decoded are left out and
    named at the start; `stop` refuses them. Anything else wrong at the start is always an error."""


def readable_images(config: MonitorConfig, name: str, index: ShardIndex, size: int) -> list[int]:
    """The numbers of the images that the monitor `name` measures, of which the first one is decoded.

    Images whose header says that they cannot be decoded are left out, and the first is named. Raises DataError if
    `on_error` is stop and there are some, if all are such, and if the first that is left cannot be decoded.
    """
    readable = evenly_spread(index, len(index))
    if len(readable) < len(index):
        first = int(index.sizes().all(axis=1).argmin())
        what = (
            f"{len(index) - len(readable):,} of {len(index):,} images of {index.called} cannot be decoded; the first: "
            f"{index.read(first).location}"
        )
        if config.on_error == "stop" or not readable:
            raise DataError(f"{name}: {what}. Take them out, or set {name}.on_error=skip, which leaves out some.")
        say([f"{name} leaves out what it cannot measure: {what}."])
    look_at_first(index, size, sample=readable[0])
    return readable


class ClassifierMonitorConfig(MonitorConfig):
    """Accuracy of the method's own classifier during training."""

    val: str
    """Shards of labelled validation images, with the classes that the method learns."""
    batch_size: BatchSize = 256
    """Images per forward pass."""
    interpolation: Interpolation = "bicubic"
    """How images are resized, antialiased in either way."""


class ClassifierMonitor:
    """Classifies validation images with the evaluated backbone and the classifier on its features; on all ranks."""

    def __init__(
        self,
        config: ClassifierMonitorConfig,
        extraction: Extraction,
        *,
        classifier: nn.Module,
        num_classes: int,
        labelled: ShardIndex | None = None,
    ) -> None:
        self.every = config.every
        self.config = config
        self.extraction = replace(extraction.resized_by(config.interpolation), batch_size=config.batch_size)
        self.classifier = classifier
        self.images = open_shards(config.val)
        names = None if labelled is None else labelled.class_names
        where = f"classifier.val={display_name(config.val)}"
        labels = classes_of(self.images, where, num_classes=num_classes, names=names)
        self.samples = readable_images(config, "classifier", self.images, extraction.preprocessing.size)
        self.labels = torch.from_numpy(labels)[self.samples]
        if labelled is not None:
            say(shared_warnings(labelled, self.images, train=labelled.called, test=display_name(config.val)))

    @torch.no_grad()
    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        """`{"classifier_top1": percent, "classifier_top5": percent}` on the validation images."""
        features = self.extraction.features(
            backbone, self.images, description="classifier, validation images", samples=self.samples
        )
        with eval_mode(self.classifier):
            scores = self.classifier(features.to(self.extraction.device)).cpu()
        return {f"classifier_{name}": percent for name, percent in top_k_accuracy(scores, self.labels).items()}


class SpectrumMonitorConfig(MonitorConfig):
    """RankMe and alpha-ReQ of the evaluated backbone's features during training; needs no labels."""

    val: str | None = None
    """Shards of the images that are measured, labelled or not; by default the training images."""
    images: Annotated[int, Field(gt=0)] = 2048
    """How many of them, evenly spread, or all if there are fewer; more images than dimensions tell more."""


class SpectrumMonitor:
    """The spectrum of the evaluated backbone's features of a sample of images; on all ranks."""

    def __init__(
        self,
        config: SpectrumMonitorConfig,
        extraction: Extraction,
        *,
        train: ShardIndex,
        embed_dim: int,
    ) -> None:
        self.every = config.every
        self.extraction = extraction
        self.images = train if config.val is None else open_shards(config.val)
        self.samples = evenly_spread(self.images, config.images)
        count = len(self.samples)
        if min(count - 1, embed_dim) < FEWEST_EIGENVALUES:
            raise ConfigError(
                f"spectrum needs {FEWEST_EIGENVALUES + 1} images and {FEWEST_EIGENVALUES} dimensions or more. Got "
                f"{count} images of {self.images.called} and {embed_dim} dimensions; leave spectrum out, or raise "
                "spectrum.images."
            )
        if config.val is None:  # undecodable training images are handled by the training
            look_at_first(self.images, extraction.preprocessing.size, sample=self.samples[0])
        else:
            readable_images(config, "spectrum", self.images, extraction.preprocessing.size)

    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        """`rankme`, the same in percent of the largest possible one (`rankme_percent`), and `alpha`."""
        features_ND = self.extraction.features(
            backbone, self.images, description="spectrum, images", samples=self.samples
        )
        rank = rankme(features_ND)
        return {
            "rankme": rank,
            "rankme_percent": 100.0 * rank / min(features_ND.shape),
            "alpha": alpha_req(features_ND),
        }
