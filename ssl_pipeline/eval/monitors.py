"""Accuracy of the classifier that a semi-supervised method learns, measured during its training."""

from __future__ import annotations

import torch
from torch import nn

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import BatchSize, Config, ConfigError
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.accuracy import top_k_accuracy
from ssl_pipeline.eval.features.extract import Precision, extract_features
from ssl_pipeline.schedule import Duration, Progress


class ClassifierMonitorConfig(Config):
    """Accuracy of the method's own classifier during training."""

    every: Duration
    """How often: `5ep`, `10%` or a number of optimizer steps; 0: only at the end, when it is measured in any case."""
    val: str
    """Shards of labelled validation images, with the classes that the method learns."""
    batch_size: BatchSize = 256
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
        labels_N = self.images.labels()
        if not self.images.has_labels or int(labels_N.max()) >= num_classes:
            problem = self.images.label_problem()
            found = f"the label {labels_N.max()}" if problem is None else f"images without a label: {problem}"
            raise ConfigError(f"classifier.val={config.val} needs labels below {num_classes}. It has {found}.")

    @torch.no_grad()
    def __call__(self, backbone: nn.Module, progress: Progress) -> dict[str, float]:
        """`{"classifier_top1": percent, "classifier_top5": percent}` on the validation images."""
        features, labels = extract_features(
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
        return {f"classifier_{name}": percent for name, percent in top_k_accuracy(scores, labels).items()}
