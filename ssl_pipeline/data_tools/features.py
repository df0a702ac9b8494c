"""The feature pass in tasks of a shard each, on an engine: what is done stays, whichever process is killed.

The file of the features has its whole size from the start, and each task writes the rows of its own images into it: all
processes, on all machines, must see it under the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.subset import open_subset
from ssl_pipeline.distributed import world_size
from ssl_pipeline.eval.features.cache import RowsFile, StoredFeatures, map_stored, place_of, read_stored, store
from ssl_pipeline.eval.features.kinds import FeatureKinds, Kind
from ssl_pipeline.eval.features.models import EvaluatedModel, open_model
from ssl_pipeline.eval.features.passes import (
    PassConfig,
    choose_device,
    compute_rows,
    feature_files,
    feature_pass,
    identity_of,
)
from ssl_pipeline.files import locked, sha256_of_json
from ssl_pipeline.packing.engine import EngineChoice, EngineConfig, Journal, map_tasks

JOURNAL = "rows.jsonl"


@dataclass(frozen=True)
class FeatureWork:
    """What a process needs to compute rows: the settings of the pass as JSON, the images, the folder of the files."""

    settings: str
    shards: str
    keep: Path | None
    kinds: tuple[Kind, ...]
    last_blocks: int
    folder: Path


class PassChoice(PassConfig, EngineChoice):
    """A model, how its features are computed, and where."""


def engine_pass(
    directory: Path,
    model: EvaluatedModel,
    network: FeatureKinds,
    index: ShardIndex,
    config: PassChoice,
    *,
    shards: str,
    keep: Path | None = None,
    description: str,
) -> StoredFeatures:
    """`feature_pass` with the engine of the settings; local is that of this process and of those of torchrun.

    shards and keep: where `index` comes from, for the processes of the engine.
    """
    if config.engine == "local":
        return feature_pass(directory, model, network, index, config, description=description)
    if world_size() > 1:
        raise ConfigError(f"engine={config.engine} starts processes of its own. Leave torchrun out.")
    identity = identity_of(model, index, config, network)
    place = place_of(directory.resolve(), identity)
    found = read_stored(place)
    if found is not None:
        return found
    folder = place.with_name(f".{place.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    settings = PassConfig.model_validate({name: getattr(config, name) for name in PassConfig.model_fields})
    work = FeatureWork(settings.model_dump_json(), shards, keep, network.kinds, network.last_blocks, folder)
    with locked(folder):
        _write_rows(work, model, network, index, config, identity=sha256_of_json(identity), description=description)
        for path in folder.glob(f"*{JOURNAL}*"):  # and what a killed start wrote aside
            path.unlink()
        store(folder, place, identity)
    return map_stored(place)


def _write_rows(
    work: FeatureWork,
    model: EvaluatedModel,
    network: FeatureKinds,
    index: ShardIndex,
    config: PassChoice,
    *,
    identity: str,
    description: str,
) -> None:
    """All rows that the journal does not have."""
    journal: Journal[int] = Journal(work.folder / JOURNAL, identity, lambda rows: rows, _count)
    if not journal.read():  # nothing is there, or of other features: the files are made again
        for file in feature_files(
            work.folder, network, len(index), model.preprocessing, config, device=choose_device("cpu")
        ).values():
            file.create()
    ends = np.cumsum(index.shard_counts).tolist()
    tasks = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start]
    map_tasks(
        partial(compute_some, work),
        tasks,
        sizes=[len(task) for task in tasks],
        engine=EngineConfig(engine=config.engine, ray_address=config.ray_address),
        description=description,
        journal=journal,
        gpus=int(config.device == "cuda"),
    )


def _count(entry: object) -> int:
    if not isinstance(entry, int):
        raise ValueError("A journal of rows has their number.")
    return entry


def compute_some(work: FeatureWork, samples: range) -> int:
    """Write the rows of some images; returns how many. Doing it again writes the same."""
    opened = _open(work)
    compute_rows(
        opened.files(),
        opened.network,
        opened.index,
        samples,
        opened.model.preprocessing,
        opened.config,
        device=choose_device(opened.config.device),
        description="",
    )
    return len(samples)


@dataclass(frozen=True)
class _Opened:
    config: PassConfig
    model: EvaluatedModel
    network: FeatureKinds
    index: ShardIndex
    files: Callable[[], dict[str, RowsFile]]


@lru_cache(maxsize=1)
def _open(work: FeatureWork) -> _Opened:
    """Model and images, opened once in each process; a task reads its images itself."""
    config = PassConfig.model_validate_json(work.settings).model_copy(update={"workers": 0})
    model = open_model(config)
    device = choose_device(config.device)
    network = FeatureKinds(model.backbone, work.kinds, last_blocks=work.last_blocks).to(device)
    index = open_subset(work.shards, keep=work.keep)
    files = partial(feature_files, work.folder, network, len(index), model.preprocessing, config, device=device)
    return _Opened(config, model, network, index, files)
