"""The labelled images of a semi-supervised method: a second endless stream in step with the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.stream import NO_MASKS, DataConfig, open_images, open_stream
from ssl_pipeline.randomness import LABELLED, hash64


def open_labelled_images(config: DataConfig) -> ShardIndex | None:
    """The labelled images, as their `keep` and `labels` leave them; DataError if one of them has no label."""
    if config.labelled is None:
        return None
    index = open_images(config, labelled=config.labelled)
    if not index.has_labels:
        raise DataError(
            f"data.labelled.shards={config.labelled.shards} has images without labels; all of them need one. "
            f"{index.label_problem()}."
        )
    return index


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
) -> Iterator[StreamBatch]:
    """This rank's share of each labelled micro-batch from optimizer step `step` on, without end.

    Each step takes the next batch_size * world_size * accumulate positions of an order of its own, from `position` on;
    by default from where steps of this size have come to.
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
    )


def with_labelled(stream: Iterator[StreamBatch], labelled: Iterator[StreamBatch]) -> Iterator[StreamBatch]:
    """Each batch of `stream` with the next one of `labelled`."""
    for batch in stream:
        batch.labelled = next(labelled)
        yield batch
