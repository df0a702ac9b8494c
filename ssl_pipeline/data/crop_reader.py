"""Batches of 8-bit crops: workers decode, crop and resize."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment.crops import crop_and_resize
from ssl_pipeline.augment.draw import ViewSampler, num_draws
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.bad_samples import BadSample
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.samples import Integers, Label, Samples, labels_layout
from ssl_pipeline.data.workers.ring import Layout

# V views of each of B images, P draws of the operations, S pixels, L patches

CHUNK_BYTES = 48_000_000  # decoded and not yet cropped, per worker: so much and an image, whatever the batch size


@dataclass
class CropBatch:
    """One process's share of a micro-batch, ready for the photometric part on the device.

    Per group crops (V,B,3,S,S) uint8, channels-last in memory, draws (V,B,P) float32, and masks (V,B,L) if it has
    some; labels (B,) int64, -1 = none, or soft ones (B,C) float32; sample_ids (B,) int64; `bad` lists the samples that
    others stand in for; `labelled` is a batch of the labelled set, if there is one.
    """

    crops: dict[str, Tensor]
    draws: dict[str, Tensor]
    masks: dict[str, Tensor]
    labels: Tensor
    sample_ids: Tensor
    bad: list[BadSample]
    labelled: StreamBatch | None = None

    def cropped(self, groups: Mapping[str, ViewGroup]) -> dict[str, Tensor]:
        """The crops of each group, which are here already."""
        return self.crops

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CropBatch:
        """The same batch on a device; labels and sample ids, which outlive a step, are copies in any case."""
        non_blocking = non_blocking and torch.device(device).type == "cuda"  # other devices' copies nobody waits for
        return replace(
            self,
            crops={group: crops.to(device, non_blocking=non_blocking) for group, crops in self.crops.items()},
            draws={group: values.to(device, non_blocking=non_blocking) for group, values in self.draws.items()},
            masks={group: masks.to(device, non_blocking=non_blocking) for group, masks in self.masks.items()},
            labels=self.labels.to(device, non_blocking=non_blocking, copy=True),
            sample_ids=self.sample_ids.to(device, non_blocking=non_blocking, copy=True),
            labelled=self.labelled and self.labelled.to(device, non_blocking=non_blocking),
        )

    def clone(self) -> CropBatch:
        """The same batch in memory of its own, for those who keep it."""
        return replace(
            self,
            crops={group: crops.clone() for group, crops in self.crops.items()},
            draws={group: values.clone() for group, values in self.draws.items()},
            masks={group: masks.clone() for group, masks in self.masks.items()},
            labels=self.labels.clone(),
            sample_ids=self.sample_ids.clone(),
            labelled=self.labelled and self.labelled.clone(),
        )


class CropReader:
    """Positions of the endless stream -> their crops, in a slot; the part that runs in the workers."""

    def __init__(self, samples: Samples, sampler: ViewSampler, *, batch_size: int) -> None:
        self.samples = samples
        self.sampler = sampler
        self.batch_size = batch_size
        self.num_draws = {name: num_draws(group) for name, group in sampler.groups.items()}

    def layout(self, positions: Sequence[int] | None = None) -> Layout:
        """Crops, draws and masks of each group, labels and sample ids; the same for every batch."""
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, group in self.sampler.groups.items():
            views = (group.count, self.batch_size)
            layout[f"crops.{name}"] = (*views, group.size, group.size, 3), torch.uint8
            layout[f"draws.{name}"] = (*views, self.num_draws[name]), torch.float32
            if name in self.sampler.masks:
                layout[f"masks.{name}"] = (*views, self.sampler.num_patches(name)), torch.bool
        layout["labels"] = labels_layout(self.samples.index, self.batch_size)
        return layout | {"sample_ids": ((self.batch_size,), torch.int64)}

    def __call__(self, positions: Sequence[int], slot: Mapping[str, Tensor]) -> list[BadSample]:
        """Read, decode and crop; raises DataError for what cannot be read or, under `stop`, decoded."""
        epochs_B, samples_B = self.samples.locate(positions)
        labels, taken, bad = list[Label](), list[int](), list[BadSample]()
        for images in self._decoded(samples_B.tolist(), labels, taken, bad):
            here = slice(len(taken) - len(images), len(taken))
            drawn = self.sampler.draw(
                positions[here],
                epochs_B=epochs_B[here],
                samples_B=samples_B[here],
                heights_B=np.array([image.shape[0] for image in images]),
                widths_B=np.array([image.shape[1] for image in images]),
            )
            for name, of in drawn.items():
                group = self.sampler.groups[name]
                crop_images(images, of.boxes, of.flips, group, out=slot[f"crops.{name}"][:, here])
                slot[f"draws.{name}"][:, here] = torch.from_numpy(of.draws)
                if of.masks is not None:
                    slot[f"masks.{name}"][:, here] = torch.from_numpy(of.masks)
        slot["labels"].numpy()[:] = labels
        slot["sample_ids"].copy_(torch.tensor(taken))
        return bad

    def batch(self, slot: Mapping[str, Tensor], bad: list[BadSample]) -> CropBatch:
        """A slot that was read, as a batch."""
        groups = self.sampler.groups
        crops = {name: channels_first(slot[f"crops.{name}"]) for name in groups}
        draws = {name: slot[f"draws.{name}"] for name in groups}
        masks = {name: slot[f"masks.{name}"] for name in groups if name in self.sampler.masks}
        return CropBatch(crops, draws, masks, slot["labels"], slot["sample_ids"], bad)

    @cached_property
    def _room(self) -> NDArray[np.uint8]:
        """For the images of a chunk, used again: fresh memory costs an eighth of the decoding."""
        return np.empty(CHUNK_BYTES, np.uint8)

    def _decoded(
        self, samples: list[int], labels: list[Label], taken: list[int], bad: list[BadSample]
    ) -> Iterator[list[Tensor]]:
        """Images in chunks of bounded size, each until the next; labels, ids, bad samples are appended on the way."""
        images, used = list[Tensor](), 0
        for sample in samples:
            image, label, actual = self.samples.decode(sample, bad, self._room[used:])
            labels.append(label)
            taken.append(actual)
            images.append(torch.from_numpy(image))
            used += image.size
            if used >= CHUNK_BYTES:
                yield images
                images, used = [], 0
        if images:
            yield images


def crop_images(
    images: Sequence[Tensor], boxes_VB4: Integers, flips_VB: NDArray[np.bool_], group: ViewGroup, *, out: Tensor
) -> None:
    """Every view of some 8-bit images (H,W,3) into `out` (V,B,S,S,3)."""
    boxes, flips, out_VBCHW = boxes_VB4.tolist(), flips_VB.tolist(), channels_first(out)
    for number, image in enumerate(images):
        for view in range(group.count):
            crop_and_resize(
                image,
                boxes[view][number],
                flip=flips[view][number],
                interpolation=group.interpolation,
                out=out_VBCHW[view, number],
            )


def channels_first(crops_VBHWC: Tensor) -> Tensor:
    """(V,B,S,S,3) as (V,B,3,S,S), which stays channels-last in memory."""
    return crops_VBHWC.movedim(-1, 2)
