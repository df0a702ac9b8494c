"""The feature pass: every image once through a frozen network, on one process or several, onto the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import BatchSize, Config, ConfigError, Processes
from ssl_pipeline.data.samples import ImageSource
from ssl_pipeline.data.shards.origins import display_name
from ssl_pipeline.distributed import failing_together, max_over_ranks, rank
from ssl_pipeline.eval.features.cache import RowsFile, StoredFeatures, map_stored, place_of, read_stored, stored_whole
from ssl_pipeline.eval.features.extract import (
    Change,
    Precision,
    eval_mode,
    extract_features,
    forward_passes,
    share_size,
)
from ssl_pipeline.eval.features.kinds import FeatureKinds
from ssl_pipeline.eval.features.models import EvaluatedModel, ModelConfig


class ForwardConfig(Config):
    """How images go through a network."""

    batch_size: BatchSize = 256
    """Images per forward pass."""
    workers: Processes = 2
    """Processes that read and decode images, for each process that computes."""
    device: str = "auto"
    """Device of the backbone: `auto` takes the GPU if there is one."""
    precision: Precision = "no"
    """Autocast of the backbone: `no` is float32."""


class PassConfig(ForwardConfig, ModelConfig):
    """A model, and how its features are computed."""

    dtype: Literal["float32", "float16"] = "float32"
    """How features are kept on disk: `float16` takes half the space and keeps 3 digits."""


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; with several processes each has its own."""
    local = os.environ.get("LOCAL_RANK", "")
    own = f"cuda:{local}" if local.isdecimal() else "cuda"
    if name == "auto":
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(own if name == "cuda" else name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu or cuda. Got '{name}'.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name} needs a GPU that torch can use. There is none; try device=cpu.")
    return device


def identity_of(
    model: EvaluatedModel, index: ImageSource, config: PassConfig, network: FeatureKinds
) -> dict[str, object]:
    """Everything that features depend on: weights, images, what is kept of them and how it is computed."""
    preprocessing = asdict(model.preprocessing)
    if model.preprocessing.fit == "crop":
        del preprocessing["fit"]  # features that were stored before there was another one are the same
    return {
        "subject": {key: value for key, value in model.about.items() if key != "run"},
        "preprocessing": preprocessing,
        "kinds": network.kinds,
        "last_blocks": network.last_blocks if "blocks" in network.kinds else None,
        "precision": config.precision,
        "dtype": config.dtype,
        "images": index.checksums,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def features_in_memory(
    config: PassConfig,
    model: EvaluatedModel,
    index: ImageSource,
    *,
    description: str,
    samples: Sequence[int] | None = None,
    change: Change | None = None,
) -> Tensor:
    """What evaluators measure of images, (N, D) float32, computed by this call and not kept: `extract_features`."""
    device = choose_device(config.device)
    features_ND, _ = extract_features(
        model.backbone.to(device),
        index,
        model.preprocessing,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        precision=config.precision,
        description=description,
        samples=samples,
        change=change,
    )
    return features_ND


def feature_pass(
    directory: Path,
    model: EvaluatedModel,
    network: FeatureKinds,
    index: ImageSource,
    config: PassConfig,
    *,
    description: str,
) -> StoredFeatures:
    """Features of every image, in the order of `index`, from a folder in `directory`, computed if they are not there.

    `network` holds the model's backbone. With a process group each rank computes a contiguous share, every image once,
    and all ranks return everything; they must see the same `directory`. An error on one is an error on all.
    """
    device = choose_device(config.device)
    identity = identity_of(model, index, config, network)
    place = place_of(directory, identity)
    found: StoredFeatures | None = None
    with failing_together(device):
        found = read_stored(place) if rank() == 0 else None
    if _first_says(found is not None, device):
        return found or map_stored(place)
    aside = place.with_name(f".{place.name}.{_first_says(os.getpid(), device)}.tmp")
    with ExitStack() as whole:
        with failing_together(device):
            network.to(device)
            files = feature_files(aside, network, len(index), model.preprocessing, config, device=device)
            if rank() == 0:
                whole.enter_context(stored_whole(place, identity, aside=aside))
                for file in files.values():
                    file.create()
        with failing_together(device):
            share = share_size(len(index))
            own = range(len(index))[rank() * share : (rank() + 1) * share]
            compute_rows(
                files, network, index, own, model.preprocessing, config, device=device, description=description
            )
    _first_says(0, device)  # the folder has its name
    return map_stored(place)


def feature_files(
    aside: Path,
    network: FeatureKinds,
    num_images: int,
    preprocessing: Preprocessing,
    config: PassConfig,
    *,
    device: torch.device,
) -> dict[str, RowsFile]:
    """A file for each kind, of the shape that one empty image gives, and one for the labels."""
    size = preprocessing.size
    with eval_mode(network), torch.no_grad():
        shapes = {
            kind: value.shape[1:] for kind, value in network(torch.zeros(1, 3, size, size, device=device)).items()
        }
    files = {
        kind: RowsFile(aside / f"{kind}.npy", (num_images, *shape), config.dtype) for kind, shape in shapes.items()
    }
    return files | {"labels": RowsFile(aside / "labels.npy", (num_images,), np.int64)}


def compute_rows(
    files: Mapping[str, RowsFile],
    network: FeatureKinds,
    index: ImageSource,
    own: range,
    preprocessing: Preprocessing,
    config: PassConfig,
    *,
    device: torch.device,
    description: str,
) -> None:
    """Write the rows of some images that follow each other."""
    if not own:
        return
    done = own[0]
    try:
        with forward_passes(
            network,
            index,
            own,
            preprocessing,
            batch_size=config.batch_size,
            workers=config.workers,
            device=device,
            precision=config.precision,
            description=description,
        ) as batches:
            for output, labels in batches:
                for kind, values in output.items():
                    files[kind].write(_stored_as(values, config.dtype, index), first=done)
                files["labels"].write(labels.numpy(), first=done)
                done += len(labels)
    finally:
        for file in files.values():
            file.close()


def _stored_as(values: Tensor, dtype: str, index: ImageSource) -> NDArray:
    """Features as they are kept; ConfigError where float16 is too small for one that float32 holds."""
    if dtype == "float32":
        return values.cpu().numpy()
    half = values.half()
    if (half.isinf() & values.isfinite()).any():
        raise ConfigError(
            f"dtype=float16 holds numbers up to 65,504. A feature of {display_name(index.source)} is "
            f"{values.abs().max():g}; take dtype=float32."
        )
    return half.cpu().numpy()


def _first_says(value: int, device: torch.device) -> int:
    """The number that the first rank has; all ranks wait for each other."""
    return int(max_over_ranks(torch.tensor(int(value) if rank() == 0 else 0, device=device)).item())
