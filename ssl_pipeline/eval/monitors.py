"""Accuracy of the classifier that a semi-supervised method learns, measured during its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import Config, ConfigError
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.eval.accuracy import top_k_accuracy
from ssl_pipeline.eval.features.extract import Precision, extract_features
from ssl_pipeline.eval.labelled import (
    LABELS_COME_FROM,
    by_name,
    check_named,
    labels_of,
    look_at_first,
    say,
    shared_warnings,
)
from ssl_pipeline.schedule import Duration, Progress


class ClassifierMonitorConfig(Config):
    """Accuracy of the method's own classifier during training."""

    every: Duration
    """How often: `5ep`, `10%` or a number of optimizer steps."""
    val: str
    """Shards of labelled validation images, with the classes that the method learns."""
    batch_size: Annotated[int, Field(gt=0)] = 256
    """Images per forward pass."""


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
        workers: int,
        device: torch.device | str,
        precision: Precision = "no",
    ) -> None:
        self.every = config.every
        self.config = config
        self.preprocessing = preprocessing
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
        names = None if labelled is None else labelled.class_names
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
        scores = self.classifier(features.to(self.device)).cpu()
        return {f"classifier_{name}": percent for name, percent in top_k_accuracy(scores, self.labels).items()}
