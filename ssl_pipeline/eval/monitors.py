"""What is measured during training beside k-NN: the accuracy of a method's own classifier, the spectrum of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline.augment.central_crop import Interpolation
from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import BatchSize, Config, ConfigError
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.eval.accuracy import top_k_accuracy
from ssl_pipeline.eval.features.extract import Precision, eval_mode, extract_features
from ssl_pipeline.eval.labelled import (
    LABELS_COME_FROM,
    by_name,
    check_named,
    labels_of,
    look_at_first,
    say,
    shared_warnings,
)
from ssl_pipeline.eval.spectra import alpha_req, rankme
from ssl_pipeline.schedule import Duration, Progress

FEWEST_EIGENVALUES = 5  # of which alpha-ReQ leaves out three


class MonitorConfig(Config):
    """When a monitor measures, and what becomes of the run when it cannot."""

    every: Duration
    """How often: `5ep`, `10%` or a number of optimizer steps; 0: only at the end, when it is measured in any case."""
    at_start: bool | None = None
    """Whether it measures before the first step too, as a row of step 0; by default where the backbone starts from
    weights."""
    on_error: Literal["skip", "stop"] = "skip"
    """What happens when it fails during training: `skip` says so in one line, the row says why, and training goes on;
    `stop` ends the run, which is saved before. What is wrong at the start is always an error."""


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
        preprocessing: Preprocessing,
        *,
        classifier: nn.Module,
        num_classes: int,
        labelled: ShardIndex | None = None,
        class_names: Sequence[str] | None = None,
        workers: int,
        device: torch.device | str,
        precision: Precision = "no",
    ) -> None:
        """labelled: the images that the classifier learns from; or class_names: the names of what it knows."""
        self.every = config.every
        self.config = config
        self.preprocessing = replace(preprocessing, interpolation=config.interpolation)
        self.classifier = classifier
        self.workers = workers
        self.device = device
        self.precision: Precision = precision
        self.images = open_shards(config.val)
        problem = self.images.label_problem()
        if problem is not None:
            raise ConfigError(
                f"classifier.val={config.val} needs labels below {num_classes}. It has images without a label: "
                f"{problem}. {LABELS_COME_FROM}"
            )
        names = class_names if labelled is None else labelled.class_names
        self.labels = torch.from_numpy(self._labels(num_classes, names))
        look_at_first(self.images, preprocessing.size)
        if labelled is not None:
            say(shared_warnings(labelled, self.images, train=labelled.source, test=config.val))

    def _labels(self, num_classes: int, names: Sequence[str] | None) -> NDArray[np.int64]:
        """The class of each image as the classifier counts them, by name where both have names."""
        val, labels_N, own = self.config.val, labels_of(self.images), self.images.class_names
        check_named(self.images, own, val)
        if own is not None and names is not None:
            unknown = [own[label] for label in np.unique(labels_N) if own[label] not in names]
            if unknown:
                raise ConfigError(
                    f"classifier.val={val} needs the classes of the labelled images ({', '.join(names[:5])}, ...: "
                    f"{len(names)} in all). It has images of {unknown[0]!r}."
                )
            return by_name(labels_N, own, names)
        if labels_N.max() >= num_classes:
            raise ConfigError(
                f"classifier.val={val} needs labels below {num_classes}. It has the label {labels_N.max()}."
            )
        return labels_N

    @torch.no_grad()
    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        """`{"classifier_top1": percent, "classifier_top5": percent}` on the validation images."""
        found = top_k_accuracy(self.scores(backbone), self.labels)
        return {f"classifier_{name}": percent for name, percent in found.items()}

    @torch.no_grad()
    def scores(self, backbone: nn.Module) -> Tensor:
        """Class scores (N, C) of the validation images, whose classes are `labels` (N,)."""
        features, _ = extract_features(
            backbone,
            self.images,
            self.preprocessing,
            batch_size=self.config.batch_size,
            workers=self.workers,
            device=self.device,
            precision=self.precision,
            description="classifier, validation images",
        )
        with eval_mode(self.classifier):
            return self.classifier(features.to(self.device)).cpu()


class SpectrumMonitorConfig(MonitorConfig):
    """RankMe and alpha-ReQ of the evaluated backbone's features during training; needs no labels."""

    val: str | None = None
    """Shards of the images that are measured, labelled or not; by default the training images."""
    images: Annotated[int, Field(gt=0)] = 2048
    """How many of them, evenly spread, or all if there are fewer; more than dimensions tell more."""


class SpectrumMonitor:
    """The spectrum of the evaluated backbone's features of a sample of images; on all ranks."""

    def __init__(
        self,
        config: SpectrumMonitorConfig,
        preprocessing: Preprocessing,
        *,
        train: ShardIndex,
        embed_dim: int,
        batch_size: int,
        workers: int,
        device: torch.device | str,
        precision: Precision = "no",
    ) -> None:
        self.every = config.every
        self.preprocessing = preprocessing
        self.batch_size, self.workers = batch_size, workers
        self.device = device
        self.precision: Precision = precision
        self.images = train if config.val is None else open_shards(config.val)
        readable_N = np.flatnonzero(self.images.sizes().all(axis=1))  # the others are known not to decode
        count = min(config.images, len(readable_N))
        self.samples: list[int] = readable_N[np.arange(count) * len(readable_N) // max(count, 1)].tolist()
        if min(count - 1, embed_dim) < FEWEST_EIGENVALUES:
            raise ConfigError(
                f"spectrum needs {FEWEST_EIGENVALUES + 1} images and {FEWEST_EIGENVALUES} dimensions or more. Got "
                f"{count} images of {self.images.source} and {embed_dim} dimensions; leave spectrum out, or raise "
                "spectrum.images."
            )
        look_at_first(self.images, preprocessing.size, sample=self.samples[0])

    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        """`rankme`, the same in percent of the largest possible one (`rankme_percent`), and `alpha`."""
        features_ND, _ = extract_features(
            backbone,
            self.images,
            self.preprocessing,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            precision=self.precision,
            description="spectrum, images",
            samples=self.samples,
        )
        rank = rankme(features_ND)
        return {
            "rankme": rank,
            "rankme_percent": 100.0 * rank / min(features_ND.shape),
            "alpha": alpha_req(features_ND),
        }
