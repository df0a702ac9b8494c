"""Features on disk, one file per (weights, images, preprocessing), shared by all evaluators of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssl_pipeline.files import sha256_of_bytes, sha256_of_json, write_tensors

logger = logging.getLogger(__name__)


def cached(
    directory: Path | None, identity: Mapping[str, object], compute: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Features and labels from `directory`, computed and stored there the first time.

    `identity` is everything that the features depend on, as JSON; its hash names the file. A file that is damaged
    or belongs to something else is computed again. Without a directory nothing is stored.
    """
    if directory is None:
        return compute()
    name = sha256_of_json(identity)[:32]
    path = directory / f"{name}.safetensors"
    if path.exists():
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("%s is damaged (%s): its features are computed again", path, error)
    features, labels = compute()
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"checksum": _checksum(features, labels)}
    write_tensors(path, {"features": features, "labels": labels}, metadata=metadata, durable=False)
    return features, labels


def _read(path: Path) -> tuple[Tensor, Tensor]:
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != {"features", "labels"}:
            raise ValueError("it does not hold features and labels")
        features, labels = file.get_tensor("features"), file.get_tensor("labels")
        expected = (file.metadata() or {}).get("checksum")
    if _checksum(features, labels) != expected:
        raise ValueError("the checksum differs")
    return features, labels


def _checksum(features: Tensor, labels: Tensor) -> str:
    kind = repr((features.shape, features.dtype, labels.shape, labels.dtype)).encode()
    parts = [tensor.contiguous().numpy().data.cast("B") for tensor in (features, labels) if tensor.numel()]
    return sha256_of_bytes(kind, *parts)
