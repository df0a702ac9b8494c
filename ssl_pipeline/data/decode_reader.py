"""Batches of decoded images: workers only decode, and the device cuts out and resizes every crop of a batch at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssl_pipeline.augment.draw import ViewSampler, num_parameters
from ssl_pipeline.augment.resample import crop_and_resize_batch
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.bad_samples import BadSample
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.crop_reader import channels_first, crop_images
from ssl_pipeline.data.decode import FORMATS, MAX_PIXELS
from ssl_pipeline.data.samples import Integers, Samples
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.shards.remote import is_url
from ssl_pipeline.data.workers.ring import Layout

# V views of each of B images, P photometric parameters, S pixels, L patches

HEADERS_READ = 64
USUAL_SIZE = (500, 400)  # of an ImageNet photograph, where no header tells


@dataclass(frozen=True)
class ImageTable:
    """Where the images of a flat buffer lie: the first byte, the height and the width (B,) of each, on the host."""

    offsets: Integers
    heights: Integers
    widths: Integers

    @classmethod
    def dense(cls, heights_B: Integers, widths_B: Integers) -> "ImageTable":
        """The images lie one after another, from the first byte on."""
        sizes_B = 3 * heights_B * widths_B
        return cls(sizes_B.cumsum() - sizes_B, heights_B, widths_B)

    def views(self, pixels: Tensor) -> list[Tensor]:
        """Each image (H,W,3) of a buffer."""
        where = zip(self.offsets.tolist(), self.heights.tolist(), self.widths.tolist(), strict=True)
        return [pixels[start : start + 3 * height * width].view(height, width, 3) for start, height, width in where]


@dataclass
class DecodedBatch:
    """One process's share of a micro-batch, decoded and not yet cropped.

    `pixels` is flat, 8 bits, and holds the images where `images` says, maybe others too; it, the parameters (V,B,P) of
    each group, its masks (V,B,L) if it has some, labels (B,) int64, -1 = none, and sample_ids (B,) int64, move to the
    device. Boxes (V,B,4) and flips (V,B) stay on the host. `bad` lists the samples that others stand in for;
    `labelled` is a batch of the labelled set.
    """

    pixels: Tensor
    images: ImageTable
    boxes: dict[str, Integers]
    flips: dict[str, NDArray[np.bool_]]
    parameters: dict[str, Tensor]
    masks: dict[str, Tensor]
    labels: Tensor
    sample_ids: Tensor
    bad: list[BadSample]
    labelled: StreamBatch | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "DecodedBatch":
        """The same batch on a device; labels and sample ids, which outlive a step, are copies in any case."""
        non_blocking = non_blocking and torch.device(device).type == "cuda"  # other devices' copies nobody waits for
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            parameters={name: values.to(device, non_blocking=non_blocking) for name, values in self.parameters.items()},
            masks={name: masks.to(device, non_blocking=non_blocking) for name, masks in self.masks.items()},
            labels=self.labels.to(device, non_blocking=non_blocking, copy=True),
            sample_ids=self.sample_ids.to(device, non_blocking=non_blocking, copy=True),
            labelled=self.labelled and self.labelled.to(device, non_blocking=non_blocking),
        )

    def clone(self) -> "DecodedBatch":
        """The same batch in memory of its own, for those who keep it: of the pixels just those of its images."""
        return replace(
            self,
            pixels=torch.cat([image_HWC.flatten() for image_HWC in self.images.views(self.pixels)]),
            images=ImageTable.dense(self.images.heights.copy(), self.images.widths.copy()),
            boxes={name: boxes_VB4.copy() for name, boxes_VB4 in self.boxes.items()},
            flips={name: flips_VB.copy() for name, flips_VB in self.flips.items()},
            parameters={name: values.clone() for name, values in self.parameters.items()},
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
    """What goes with a slot: how much of it is used, and its pixels where they did not fit."""

    num_images: int
    used: int
    bad: list[BadSample]
    overflow: NDArray[np.uint8] | None


class DecodedReader:
    """Positions of the endless stream -> their pixels and what is drawn for them; the part that runs in the workers."""

    def __init__(self, samples: Samples, sampler: ViewSampler, *, batch_size: int, slot_bytes: int) -> None:
        self.samples = samples
        self.sampler = sampler
        self.batch_size = batch_size
        self.slot_bytes = slot_bytes

    def layout(self) -> Layout:
        """The flat pixels, the images' sizes (B,2), labels and ids, and for each group what is drawn for it."""
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "pixels": ((self.slot_bytes,), torch.uint8),
            "sizes": ((self.batch_size, 2), torch.int64),
            "labels": ((self.batch_size,), torch.int64),
            "sample_ids": ((self.batch_size,), torch.int64),
        }
        for name, group in self.sampler.groups.items():
            shape = (group.count, self.batch_size)
            layout[f"boxes.{name}"] = ((*shape, 4), torch.int64)
            layout[f"flips.{name}"] = (shape, torch.bool)
            layout[f"parameters.{name}"] = ((*shape, num_parameters(group)), torch.float32)
            if name in self.sampler.masks:
                layout[f"masks.{name}"] = ((*shape, self.sampler.num_patches(name)), torch.bool)
        return layout

    def __call__(self, positions: Sequence[int], slot: Mapping[str, Tensor]) -> Decoded:
        """Read and decode into the slot; raises DataError for what cannot be read or, under `stop`, decoded."""
        epochs_B, samples_B = self.samples.locate(positions)
        room = pixels = slot["pixels"].numpy()
        sizes_B2, labels_B, sample_ids_B = (slot[name].numpy() for name in ("sizes", "labels", "sample_ids"))
        used, bad = 0, list[BadSample]()
        for number, sample in enumerate(samples_B.tolist()):
            image, labels_B[number], sample_ids_B[number] = self.samples.decode(sample, bad, pixels[used:])
            if image.size > len(pixels) - used:
                pixels = np.concatenate((pixels[:used], np.empty(max(image.size, len(pixels)), np.uint8)))
                pixels[used : used + image.size] = image.ravel()
            sizes_B2[number] = image.shape[:2]
            used += image.size
        num_images = len(samples_B)
        heights_B, widths_B = sizes_B2[:num_images].T
        drawn = self.sampler.draw(
            positions, epochs_B=epochs_B, samples_B=samples_B, heights_B=heights_B, widths_B=widths_B
        )
        for name, group in drawn.items():
            slot[f"boxes.{name}"].numpy()[:] = group.boxes
            slot[f"flips.{name}"].numpy()[:] = group.flips
            slot[f"parameters.{name}"].numpy()[:] = group.parameters
            if group.masks is not None:
                slot[f"masks.{name}"].numpy()[:] = group.masks
        return Decoded(num_images, used, bad, None if pixels is room else pixels[:used])

    def batch(self, slot: Mapping[str, Tensor], decoded: Decoded) -> DecodedBatch:
        """What a worker left in a slot, as a batch; its tensors are views of the slot."""
        groups = self.sampler.groups
        heights_B, widths_B = slot["sizes"][: decoded.num_images].numpy().T
        if decoded.overflow is not None:
            pixels = torch.from_numpy(decoded.overflow)
        else:  # with a row more, which the device reads past the end
            pixels = slot["pixels"][: decoded.used + 3 * int(widths_B.max())]
        return DecodedBatch(
            pixels,
            ImageTable.dense(heights_B, widths_B),
            {name: slot[f"boxes.{name}"].numpy() for name in groups},
            {name: slot[f"flips.{name}"].numpy() for name in groups},
            {name: slot[f"parameters.{name}"] for name in groups},
            {name: slot[f"masks.{name}"] for name in groups if name in self.sampler.masks},
            slot["labels"][: decoded.num_images],
            slot["sample_ids"][: decoded.num_images],
            decoded.bad,
        )


@dataclass(frozen=True)
class ImageBytes:
    """Bytes of the decoded images of a set, by the headers of some of them, and the longest row."""

    mean: float
    deviation: float
    longest_row: int

    def of(self, count: int) -> int:
        """Room for `count` images at random, which hardly ever overflows; no more than that if all have one size."""
        uncertain = self.deviation / math.sqrt(HEADERS_READ)
        spread = 4 * self.deviation * math.sqrt(count)
        return math.ceil(count * (self.mean + 2 * uncertain) + spread) + self.longest_row


def estimate_image_bytes(index: ShardIndex) -> ImageBytes:
    """From the headers of 64 images all over the set; all over the first shard if each must be fetched."""
    within = int(index.shard_counts[0]) if is_url(index.source) else len(index)
    sizes = []
    for sample in np.unique(np.linspace(0, within - 1, HEADERS_READ).astype(np.int64)).tolist():
        try:
            with Image.open(BytesIO(index.read(sample).image), formats=FORMATS) as image:
                sizes.append(image.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # its turn to be refused comes when it is decoded
    sizes = [(width, height) for width, height in sizes if width * height <= MAX_PIXELS] or [USUAL_SIZE]
    sizes_N = np.array([3 * width * height for width, height in sizes])
    sizes_N = np.minimum(sizes_N, 4 * np.median(sizes_N))  # a rare giant travels by pipe rather than enlarge every slot
    return ImageBytes(float(sizes_N.mean()), float(sizes_N.std()), 3 * max(max(size) for size in sizes))
