"""Batches of 8-bit crops: workers decode, crop and resize."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment.crops import crop_images
from ssl_pipeline.augment.draw import ViewSampler
from ssl_pipeline.data.bad_samples import BadSample
from ssl_pipeline.data.batches import Notes, drawn_layout
from ssl_pipeline.data.samples import Label, Samples, labels_layout
from ssl_pipeline.data.workers.ring import Layout

CHUNK_BYTES = 48_000_000  # decoded and not yet cropped, per worker: so much and an image, whatever the batch size


class CropReader:
    """Positions of the endless stream -> their crops; the part that runs in the workers."""

    def __init__(self, samples: Samples, sampler: ViewSampler, *, batch_size: int) -> None:
        self.samples = samples
        self.sampler = sampler
        self.batch_size = batch_size

    def layout(self, positions: Sequence[int] | None = None) -> Layout:
        """Crops (V,B,S,S,3), draws and masks of each group, labels and sample ids."""
        sizes = self.sampler.sizes(positions)
        crops = {
            f"crops.{name}": ((group.count, self.batch_size, sizes[name], sizes[name], 3), torch.uint8)
            for name, group in self.sampler.groups.items()
        }
        return {
            **crops,
            **drawn_layout(self.sampler, self.batch_size, sizes),
            "labels": labels_layout(self.samples.index, self.batch_size),
            "sample_ids": ((self.batch_size,), torch.int64),
        }

    def __call__(self, positions: Sequence[int], tensors: Mapping[str, Tensor]) -> Notes:
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
                interpolation, crops = self.sampler.groups[name].interpolation, tensors[f"crops.{name}"][:, here]
                crop_images(images, of.boxes, of.flips, interpolation=interpolation, out=crops)
                tensors[f"draws.{name}"][:, here] = torch.from_numpy(of.draws)
                if of.masks is not None:
                    tensors[f"masks.{name}"][:, here] = torch.from_numpy(of.masks)
        tensors["labels"].numpy()[:] = labels
        tensors["sample_ids"].copy_(torch.tensor(taken))
        return Notes(bad, self.sampler.sizes(positions))

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
