"""Batches of decoded images: workers only decode, and the device cuts out and resizes every crop of a batch at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment.draw import ViewSampler
from ssl_pipeline.data.bad_samples import BadSample
from ssl_pipeline.data.batches import Notes, drawn_layout
from ssl_pipeline.data.samples import Samples, labels_layout
from ssl_pipeline.data.workers.ring import Layout


class DecodedReader:
    """Positions of the endless stream -> their pixels and what is drawn for them; the part that runs in the workers.

    Each batch has room only for its own images, whose sizes the index knows. Only where damaged images are replaced may
    some find none: these, in most cases the last one of the batch, travel by pipe.
    """

    def __init__(self, samples: Samples, sampler: ViewSampler, *, batch_size: int) -> None:
        self.samples = samples
        self.sampler = sampler
        self.batch_size = batch_size
        self.row_bytes = 3 * samples.index.widest  # a row more, which the device reads past the end

    def layout(self, positions: Sequence[int] | None = None) -> Layout:
        """The flat pixels, the images' sizes (B,2), labels and ids; boxes, flips, draws and masks of each group."""
        if positions is None:
            num_images, used = self.batch_size, math.ceil(self.batch_size * self.samples.usual_pixel_bytes())
        else:
            num_images, used = len(positions), int(self.samples.pixel_bytes(positions).sum())
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "pixels": ((used + self.row_bytes,), torch.uint8),
            "sizes": ((num_images, 2), torch.int64),
            "labels": labels_layout(self.samples.index, num_images),
            "sample_ids": ((num_images,), torch.int64),
        }
        for name, group in self.sampler.groups.items():
            layout[f"boxes.{name}"] = ((group.count, num_images, 4), torch.int64)
            layout[f"flips.{name}"] = ((group.count, num_images), torch.bool)
        return layout | drawn_layout(self.sampler, num_images, self.sampler.sizes(positions))

    def __call__(self, positions: Sequence[int], tensors: Mapping[str, Tensor]) -> Notes:
        """Read and decode; raises DataError for what cannot be read or, under `stop`, decoded."""
        epochs_B, samples_B = self.samples.locate(positions)
        sizes_B2, labels_B, sample_ids_B = (tensors[name].numpy() for name in ("sizes", "labels", "sample_ids"))
        room = tensors["pixels"].numpy()[: len(tensors["pixels"]) - self.row_bytes]
        used, bad, displaced = 0, list[BadSample](), list[NDArray[np.uint8]]()
        for number, sample in enumerate(samples_B.tolist()):
            image, labels_B[number], sample_ids_B[number] = self.samples.decode(sample, bad, room[used:])
            sizes_B2[number] = image.shape[:2]
            if displaced or image.size > len(room) - used:
                displaced.append(image.flatten())
            else:
                used += image.size
        heights_B, widths_B = sizes_B2.T
        drawn = self.sampler.draw(
            positions, epochs_B=epochs_B, samples_B=samples_B, heights_B=heights_B, widths_B=widths_B
        )
        for name, of in drawn.items():
            tensors[f"boxes.{name}"].numpy()[:] = of.boxes
            tensors[f"flips.{name}"].numpy()[:] = of.flips
            tensors[f"draws.{name}"].numpy()[:] = of.draws
            if of.masks is not None:
                tensors[f"masks.{name}"].numpy()[:] = of.masks
        return Notes(bad, self.sampler.sizes(positions), used, np.concatenate(displaced) if displaced else None)
