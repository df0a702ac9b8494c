"""Batches of decoded images: workers only decode, and the device cuts out and resizes every crop of a batch at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment.draw import ViewSampler, num_draws
from ssl_pipeline.augment.resample import crop_and_resize_batch
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.bad_samples import BadSample
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.crop_reader import channels_first, crop_images
from ssl_pipeline.data.samples import Integers, Samples, labels_layout
from ssl_pipeline.data.workers.ring import Layout

# V views of each of B images, P draws of the operations, S pixels, L patches


@dataclass(frozen=True)
class ImageTable:
    """Where the images of a flat buffer lie: the first byte, the height and the width (B,) of each, on the host."""

    offsets: Integers
    heights: Integers
    widths: Integers

    @classmethod
    def dense(cls, heights_B: Integers, widths_B: Integers) -> ImageTable:
        """The images lie one after another, from the first byte on."""
        sizes_B = 3 * heights_B * widths_B
        return cls(sizes_B.cumsum() - sizes_B, heights_B, widths_B)

    def of(self, images: Integers) -> ImageTable:
        """Where some of the images lie, by their numbers."""
        return ImageTable(self.offsets[images], self.heights[images], self.widths[images])

    def views(self, pixels: Tensor) -> list[Tensor]:
        """Each image (H,W,3) of a buffer."""
        where = zip(self.offsets.tolist(), self.heights.tolist(), self.widths.tolist(), strict=True)
        return [pixels[start : start + 3 * height * width].view(height, width, 3) for start, height, width in where]


@dataclass
class DecodedBatch:
    """One process's share of a micro-batch, decoded and not yet cropped.

    `pixels` is flat, 8 bits, and holds the images where `images` says, maybe others too; it, the draws (V,B,P) of
    each group, its masks (V,B,L) if it has some, labels (B,) int64, -1 = none, or soft ones (B,C) float32, and
    sample_ids (B,) int64, move to the device. Boxes (V,B,4) and flips (V,B) stay on the host. `bad` lists the samples
    that others stand in for; `labelled` is a batch of the labelled set.
    """

    pixels: Tensor
    images: ImageTable
    boxes: dict[str, Integers]
    flips: dict[str, NDArray[np.bool_]]
    draws: dict[str, Tensor]
    masks: dict[str, Tensor]
    labels: Tensor
    sample_ids: Tensor
    bad: list[BadSample]
    labelled: StreamBatch | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DecodedBatch:
        """The same batch on a device; labels and sample ids, which outlive a step, are copies in any case."""
        non_blocking = non_blocking and torch.device(device).type == "cuda"  # other devices' copies nobody waits for
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            draws={name: values.to(device, non_blocking=non_blocking) for name, values in self.draws.items()},
            masks={name: masks.to(device, non_blocking=non_blocking) for name, masks in self.masks.items()},
            labels=self.labels.to(device, non_blocking=non_blocking, copy=True),
            sample_ids=self.sample_ids.to(device, non_blocking=non_blocking, copy=True),
            labelled=self.labelled and self.labelled.to(device, non_blocking=non_blocking),
        )

    def clone(self) -> DecodedBatch:
        """The same batch in memory of its own, for those who keep it: of the pixels just those of its images."""
        return replace(
            self,
            pixels=torch.cat([image_HWC.flatten() for image_HWC in self.images.views(self.pixels)]),
            images=ImageTable.dense(self.images.heights.copy(), self.images.widths.copy()),
            boxes={name: boxes_VB4.copy() for name, boxes_VB4 in self.boxes.items()},
            flips={name: flips_VB.copy() for name, flips_VB in self.flips.items()},
            draws={name: values.clone() for name, values in self.draws.items()},
            masks={name: masks.clone() for name, masks in self.masks.items()},
            labels=self.labels.clone(),
            sample_ids=self.sample_ids.clone(),
            labelled=self.labelled and self.labelled.clone(),
        )

    def cropped(self, groups: Mapping[str, ViewGroup]) -> dict[str, Tensor]:
        """The crops (V,B,3,S,S) of each group that was drawn, in [0, 255] on the batch's device.

        On an accelerator they are float32, not rounded. On a CPU they are uint8, bit for bit those that workers would
        have made: torch's 8-bit kernel takes a fifth of the time there (at 32 pixels about the same).
        """
        crop = _crops_in_8_bits if self.pixels.device.type == "cpu" else _crops_at_once
        return {
            name: crop(self.pixels, self.images, boxes_VB4, self.flips[name], groups[name])
            for name, boxes_VB4 in self.boxes.items()
        }


def _crops_at_once(
    pixels: Tensor, images: ImageTable, boxes_VB4: Integers, flips_VB: NDArray[np.bool_], group: ViewGroup
) -> Tensor:
    return crop_and_resize_batch(
        pixels,
        images.offsets,
        images.heights,
        images.widths,
        boxes_VB4,
        flips_VB,
        size=group.size,
        interpolation=group.interpolation,
    )


def _crops_in_8_bits(
    pixels: Tensor, images: ImageTable, boxes_VB4: Integers, flips_VB: NDArray[np.bool_], group: ViewGroup
) -> Tensor:
    crops_VBHWC = torch.empty((*flips_VB.shape, group.size, group.size, 3), dtype=torch.uint8)
    crop_images(images.views(pixels), boxes_VB4, flips_VB, group, out=crops_VBHWC)
    return channels_first(crops_VBHWC)


@dataclass(frozen=True)
class Decoded:
    """What goes with the tensors of a batch: how many bytes of its pixels are used, and pixels that found no room."""

    used: int
    bad: list[BadSample]
    displaced: NDArray[np.uint8] | None


class DecodedReader:
    """Positions of the endless stream -> their pixels and what is drawn for them; the part that runs in the workers.

    Each batch has room for just its own images, whose sizes the index knows. Only where other images stand in for
    damaged ones may some find none: these, in most cases the last one of the batch, travel by pipe.
    """

    def __init__(self, samples: Samples, sampler: ViewSampler, *, batch_size: int) -> None:
        self.samples = samples
        self.sampler = sampler
        self.batch_size = batch_size
        self.num_draws = {name: num_draws(group) for name, group in sampler.groups.items()}
        self.row_bytes = 3 * samples.index.widest  # a row more, which the device reads past the end

    def layout(self, positions: Sequence[int] | None = None) -> Layout:
        """The flat pixels, the images' sizes (B,2), labels and ids, and for each group what is drawn for it."""
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
            shape = (group.count, num_images)
            layout[f"boxes.{name}"] = ((*shape, 4), torch.int64)
            layout[f"flips.{name}"] = (shape, torch.bool)
            layout[f"draws.{name}"] = ((*shape, self.num_draws[name]), torch.float32)
            if name in self.sampler.masks:
                layout[f"masks.{name}"] = ((*shape, self.sampler.num_patches(name)), torch.bool)
        return layout

    def __call__(self, positions: Sequence[int], slot: Mapping[str, Tensor]) -> Decoded:
        """Read and decode into the slot; raises DataError for what cannot be read or, under `stop`, decoded."""
        epochs_B, samples_B = self.samples.locate(positions)
        sizes_B2, labels_B, sample_ids_B = (slot[name].numpy() for name in ("sizes", "labels", "sample_ids"))
        room = slot["pixels"].numpy()[: len(slot["pixels"]) - self.row_bytes]
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
        for name, group in drawn.items():
            slot[f"boxes.{name}"].numpy()[:] = group.boxes
            slot[f"flips.{name}"].numpy()[:] = group.flips
            slot[f"draws.{name}"].numpy()[:] = group.draws
            if group.masks is not None:
                slot[f"masks.{name}"].numpy()[:] = group.masks
        return Decoded(used, bad, np.concatenate(displaced) if displaced else None)

    def batch(self, slot: Mapping[str, Tensor], decoded: Decoded) -> DecodedBatch:
        """What a worker left in a slot, as a batch; its tensors are views of the slot."""
        groups = self.sampler.groups
        heights_B, widths_B = slot["sizes"].numpy().T
        pixels = slot["pixels"][: decoded.used + 3 * int(widths_B.max())]
        if decoded.displaced is not None:
            row = torch.zeros(self.row_bytes, dtype=torch.uint8)
            pixels = torch.cat((slot["pixels"][: decoded.used], torch.from_numpy(decoded.displaced), row))
        return DecodedBatch(
            pixels,
            ImageTable.dense(heights_B, widths_B),
            {name: slot[f"boxes.{name}"].numpy() for name in groups},
            {name: slot[f"flips.{name}"].numpy() for name in groups},
            {name: slot[f"draws.{name}"] for name in groups},
            {name: slot[f"masks.{name}"] for name in groups if name in self.sampler.masks},
            slot["labels"],
            slot["sample_ids"],
            decoded.bad,
        )
