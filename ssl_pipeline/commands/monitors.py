"""The monitors of a recipe, opened and checked before training, and how the run calls them."""

from __future__ import annotations

import torch

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.eval.features.extract import Extraction, Precision
from ssl_pipeline.eval.knn import KnnMonitor, KnnMonitorConfig
from ssl_pipeline.eval.monitors import (
    ClassifierMonitor,
    ClassifierMonitorConfig,
    MonitorConfig,
    SpectrumMonitor,
    SpectrumMonitorConfig,
)
from ssl_pipeline.methods.base import Method
from ssl_pipeline.training.meeting import require_same
from ssl_pipeline.training.monitors import Watched
from ssl_pipeline.training.run import Monitor

KNN = {"knn_top1": "k-NN top-1"}
SPECTRUM = {"rankme_percent": "RankMe (in percent of the largest possible rank)"}


def open_monitors(
    knn: KnnMonitorConfig | None,
    spectrum: SpectrumMonitorConfig | None,
    classifier: ClassifierMonitorConfig | None,
    *,
    method: Method,
    preprocessing: Preprocessing,
    data: DataConfig,
    index: ShardIndex,
    labelled_index: ShardIndex | None,
    from_weights: bool,
    device: torch.device,
    precision: Precision,
) -> list[Monitor]:
    """Those that have settings, which measure in the run's precision. Raises ConfigError or DataError for images that
    cannot be measured."""
    extraction = Extraction(preprocessing, data.batch_size, data.workers, device, precision)
    monitors: list[Monitor] = []

    def watch(monitor: Monitor, name: str, config: MonitorConfig, compared: dict[str, str]) -> None:
        at_start = from_weights if config.at_start is None else config.at_start
        monitors.append(Watched(monitor, name, at_start, config.on_error, compared))

    if knn is not None:
        of_knn = KnnMonitor(knn, extraction)
        for name, images in (("knn.train", of_knn.images.train), ("knn.val", of_knn.images.test)):
            require_same(f"images of {name}", images.called, images.fingerprint, device)
        watch(of_knn, "knn", knn, KNN)
    if spectrum is not None:
        of_spectrum = SpectrumMonitor(spectrum, extraction, train=index, embed_dim=method.backbone.embed_dim)
        require_same("images of spectrum.val", of_spectrum.images.called, of_spectrum.images.fingerprint, device)
        watch(of_spectrum, "spectrum", spectrum, SPECTRUM)
    if classifier is not None:
        if method.classifier is None:
            raise ConfigError(
                f"{type(method).__name__} learns no classifier to measure. Leave classifier out; knn suits any method."
            )
        of_classifier = ClassifierMonitor(
            classifier,
            extraction,
            classifier=method.classifier,
            num_classes=method.classifier.out_features,
            labelled=labelled_index,
        )
        measured = of_classifier.images
        require_same("images of classifier.val", measured.called, measured.fingerprint, device)
        watch(of_classifier, "classifier", classifier, {})
    return monitors
