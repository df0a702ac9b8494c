"""The labelled images of a semi-supervised method: a second endless stream in step with the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.shards.origins import display_name
from ssl_pipeline.data.stream import NO_MASKS, DataConfig, open_images, open_stream
from ssl_pipeline.randomness import LABELLED, hash64


def open_labelled_images(config: DataConfig) -> ShardIndex | None:
    """The labelled images, as their `keep` and `labels` leave them; DataError if one of them has no label."""
    if config.labelled is None:
        return None
    index = open_images(config, labelled=config.labelled)
    if not index.has_labels:
        raise DataError(
            f"data.labelled.shards={display_name(config.labelled.shards)} has images without labels; "
            f"all of them need one. {index.label_problem()}."
        )
    return index


def classes_with_labels(index: ShardIndex) -> list[int]:
    """The classes that a labelled image is of, ascending; soft labels count where they are above 0."""
    labels = index.labels()
    found: list[int] = (np.unique(labels) if labels.ndim == 1 else np.flatnonzero((labels > 0).any(axis=0))).tolist()
    return found


def classes_without_labels(index: ShardIndex, num_classes: int) -> list[str]:
    """The classes, by name where they have one, that no labelled image is of, as `classes_with_labels` counts.

    A method never learns these: it can only guess the others.
    """
    missing = np.setdiff1d(np.arange(num_classes), classes_with_labels(index)).tolist()
    return [str(number) if index.class_names is None else index.class_names[number] for number in missing]


def open_labelled_stream(
    index: ShardIndex,
    groups: Mapping[str, ViewGroup],
    config: DataConfig,
    *,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    accumulate: int,
    position: int | None = None,
    masks: Mapping[str, MaskRule] = NO_MASKS,
    device: torch.device | str = "cpu",
    keepalive: Callable[[], None] = lambda: None,
    memory_share: float = 1.0,
) -> Iterator[StreamBatch]:
    """This rank's share of each labelled micro-batch from optimizer step `step` on, without end.

    Each step takes the next batch_size * world_size * accumulate positions of its own order, from `position` on; by
    default from where steps of this size have got to.
    """
    assert config.labelled is not None
    own = config.model_copy(
        update={
            "shards": config.labelled.shards,
            "keep": config.labelled.keep,
            "labels": config.labelled.labels,
            "batch_size": config.labelled.batch_size,
            "workers": min(config.workers, 1),
            "bad_samples": "stop",
            "labelled": None,
        }
    )
    return open_stream(
        index,
        groups,
        own,
        seed=int(hash64(seed, LABELLED)) >> 1,
        position=step * own.batch_size * world_size * accumulate if position is None else position,
        step=step,
        rank=rank,
        world_size=world_size,
        masks=masks,
        accumulate=accumulate,
        size_seed=seed,
        repeat=True,
        device=device,
        keepalive=keepalive,
        memory_share=memory_share,
    )


def with_labelled(stream: Iterator[StreamBatch], labelled: Iterator[StreamBatch]) -> Iterator[StreamBatch]:
    """Each batch of `stream` with the next one of `labelled`."""
    for batch in stream:
        batch.labelled = next(labelled)
        yield batch
