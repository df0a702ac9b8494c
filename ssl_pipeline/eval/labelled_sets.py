"""The labelled images that a run knows of, so that the command that measures it can be shown with their paths."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.listing import shards_may_be_at
from ssl_pipeline.data.shards.manifest import read_manifest
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.shards.origins import packed_from
from ssl_pipeline.eval.knn import KnnConfig
from ssl_pipeline.packing.candidates import TEST, TRAIN
from ssl_pipeline.run.doctor.records import settings_of

PER_CLASS = 2  # images that a class has at least in the mean: each needs another one to vote for it
UNKNOWN = "train=SHARDS test=SHARDS"


@dataclass(frozen=True)
class LabelledSets:
    """Labelled images to measure by and on, as shards or folders; one set twice: each image by all others."""

    train: str
    test: str

    def __str__(self) -> str:
        """As arguments of eval.knn, quoted for a shell."""
        alone = " leave_one_out=true" if self.train == self.test else ""
        return f"train={shlex.quote(self.train)} test={shlex.quote(self.test)}{alone}"


def labelled_sets(run: Path) -> LabelledSets | None:
    """Those of its k-NN monitor, or its own images with the test set next to them, or only its own images; None if it
    knows of no labels, or of too few for k-NN with its default k.
    """
    settings = _settings_in(run)
    knn, data = (settings.get(name) or {} for name in ("knn", "data"))
    train, val = knn.get("train"), knn.get("val")
    own = data.get("shards") if data.get("image_key") is None else None  # evaluators take the only image of a sample
    if train is not None and val is not None and all(map(shards_may_be_at, (train, val))):
        return LabelledSets(train, val)
    if isinstance(own, str) and (beside := next(_beside(own), None)) is not None:
        return beside
    for shards in (train, own):
        if isinstance(shards, str) and _votes(shards, alone=True) is not None:
            return LabelledSets(shards, shards)
    return None


def measured_on(run: Path) -> str | None:
    """The labelled images that its classifier is measured on, or the test set next to its own images."""
    settings = _settings_in(run)
    val, own = ((settings.get(name) or {}).get(key) for name, key in (("classifier", "val"), ("data", "shards")))
    if isinstance(val, str) and shards_may_be_at(val):
        return val
    beside = next(_beside(own), None) if isinstance(own, str) else None
    return None if beside is None else beside.test


def _settings_in(run: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml; empty without such."""
    try:
        return settings_of((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _beside(own: str) -> Iterator[LabelledSets]:
    """The test sets next to shards, or next to or in the folder that a command packed into them, with `own`."""
    source = packed_from(Path(own))
    place = Path(source or own)
    if place.name.lower() in TRAIN:
        index = _votes(own, alone=False)
        names = None if index is None else index.class_names
        for test in map(place.with_name, TEST if names else ()):
            if _classes(test) <= set(names or ()) and _classes(test):
                yield LabelledSets(own, str(test))
    elif source is not None:  # DATA of DATA/train and DATA/test, packed as one set without labels
        train = next((place / name for name in TRAIN if _classes(place / name)), None)
        for test in (place / name for name in TEST if train is not None):
            if train is not None and _classes(test) and _classes(test) <= _classes(train):
                yield LabelledSets(str(train), str(test))


def _classes(folder: Path) -> set[str]:
    """The names of the classes of shards as their manifest has them, or of a folder of class folders."""
    try:
        if next(folder.glob("*.tar"), None) is not None:
            manifest = read_manifest(folder)
            return set() if manifest is None else set(manifest.class_names or ())
        return {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    except (OSError, DataError):
        return set()


def _votes(shards: str, *, alone: bool) -> ShardIndex | None:
    """The images, if they have labels that k-NN can use; alone: by all others of the same set."""
    try:
        if "://" in shards or not shards_may_be_at(shards):
            return None
        index = open_shards(shards)
    except (DataError, OSError):  # a successful run does not fail because of a hint
        return None
    if index.label_problem() is not None:
        return None
    (most,), classes = KnnConfig.model_fields["k"].default, len(np.unique(index.labels()))
    enough = len(index) > most and (not alone or classes <= len(index) / PER_CLASS)
    return index if enough and classes >= 2 else None
