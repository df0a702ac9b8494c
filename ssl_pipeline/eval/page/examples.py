"""Some images of a run as its newest backbone sees them: what neighbours, the map and the token maps are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import ConfigError, validate
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, open_images
from ssl_pipeline.eval.features.extract import extract_features
from ssl_pipeline.eval.features.models import EvaluatedModel, ModelConfig, open_model
from ssl_pipeline.eval.features.passes import choose_device
from ssl_pipeline.eval.page.record import Record


@dataclass(frozen=True)
class Examples:
    """Images evenly spread over a set, with unit features (N, D) and the name of each one's class, "" without."""

    model: EvaluatedModel
    source: str
    index: ShardIndex
    samples: list[int]
    features: Tensor
    classes: list[str]
    device: torch.device

    def spread(self, count: int) -> list[int]:
        """The places of `count` of them, or of all, evenly spread."""
        count = min(count, len(self.samples))
        return (torch.arange(count) * len(self.samples) // max(count, 1)).tolist()


def look_at_examples(record: Record, source: str | None, *, count: int, device: str) -> Examples:
    """`count` images of `source`, of what the run was evaluated on, or of its own, through its newest backbone.

    Raises ConfigError or DataError where there is no backbone or no image.
    """
    model = open_model(ModelConfig(run=record.path))
    source, index = _open_images(record, source)
    readable_N = np.flatnonzero(index.sizes().all(axis=1))  # the others are known not to decode
    count = min(count, len(readable_N))
    if count < 2:
        raise ConfigError(f"{source} has fewer than two images that can be decoded.")
    samples: list[int] = readable_N[np.arange(count) * len(readable_N) // count].tolist()
    place = choose_device(device)
    features_ND, _ = extract_features(
        model.backbone.to(place),
        index,
        model.preprocessing,
        batch_size=64,
        workers=0,
        device=place,
        description="images for the page",
        samples=samples,
    )
    if not features_ND.isfinite().all():
        raise ConfigError("the backbone's features are not finite: its weights are broken.")
    return Examples(model, source, index, samples, normalize(features_ND, dim=1), classes_of(index, samples), place)


def _open_images(record: Record, source: str | None) -> tuple[str, ShardIndex]:
    """The images that are asked for, or those that something was measured on, or those of the run itself."""
    measured = [str(report["protocol"]["test"]) for report in record.reports.values() if "test" in report["protocol"]]
    monitored = [str(place) for name in ("knn", "classifier") if (place := record.setting(name, "val"))]
    for place in [source] if source else [*measured, *monitored]:
        try:
            return place, open_shards(place)
        except (DataError, OSError) as error:
            if source:
                raise ConfigError(f"test={source} cannot be opened: {error}") from None
    data = record.settings.get("data")
    if not isinstance(data, dict):
        raise ConfigError("it is not known which images the run trained on: it has no config.yaml.")
    config = validate(DataConfig, data)
    return str(config.shards), open_images(config)


def classes_of(index: ShardIndex, samples: Sequence[int]) -> list[str]:
    """What the class of each image is called; "" where an image has none."""
    if index.num_soft_classes is not None:
        return [""] * len(samples)
    labels = np.asarray(index.labels())[list(samples)].tolist()
    names = index.class_names
    return ["" if label < 0 else str(label) if names is None else str(names[label]) for label in labels]


def is_there(run: Path) -> bool:
    """Whether the run has a backbone yet."""
    return (run / "backbone.safetensors").is_file() or any((run / "checkpoints").glob("step-*/manifest.json"))
