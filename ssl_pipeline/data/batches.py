"""What every batch of the stream answers, whatever it holds and wherever its crops are cut out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ssl_pipeline.augment.photometric import Channels, apply_photometric
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import Batch
from ssl_pipeline.data.bad_samples import BadSample


class StreamBatch(Protocol):
    """One process's share of a micro-batch: V views of each of B images, before the photometric part.

    draws: (V,B,P) float32 of each group of views: the numbers for its operations.
    masks: (V,B,L) bool of each group that has some.
    labels: (B,) int64, -1 where an image has none; or soft ones (B,C) float32.
    sample_ids: (B,) int64, places in the set as its overlay leaves it: of a set of N images 0 to N-1.
    bad: the samples that others stand in for.
    labelled: a batch of the labelled set, if there is one.
    """

    draws: dict[str, Tensor]
    masks: dict[str, Tensor]
    labels: Tensor
    sample_ids: Tensor
    bad: list[BadSample]
    labelled: StreamBatch | None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> StreamBatch:
        """The same batch on a device; labels and sample ids, which outlive a step, are copies in any case."""
        ...

    def clone(self) -> StreamBatch:
        """The same batch in memory of its own, for those who keep it."""
        ...

    def cropped(self, groups: Mapping[str, ViewGroup]) -> dict[str, Tensor]:
        """The crops (V,B,3,S,S) of each group in [0, 255], uint8 or float32, on the batch's device."""
        ...


def make_batch(images: StreamBatch, augment: Mapping[str, ViewGroup], *, mean: Channels, std: Channels) -> Batch:
    """The views of a batch from the stream, cropped and augmented on the device that it is on."""
    batch = _make_part(images, augment, mean=mean, std=std)
    if images.labelled is None:
        return batch
    return replace(batch, labelled=_make_part(images.labelled, augment, mean=mean, std=std))


def _make_part(images: StreamBatch, augment: Mapping[str, ViewGroup], *, mean: Channels, std: Channels) -> Batch:
    views = {
        name: apply_photometric(crops, images.draws[name], augment[name], mean=mean, std=std)
        for name, crops in images.cropped(augment).items()
    }
    return Batch(views, images.labels, images.sample_ids, masks=images.masks)
