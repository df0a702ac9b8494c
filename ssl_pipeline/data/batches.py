"""What the stream yields, wherever crops are made, and the batch that a method gets from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment.crops import crop_images
from ssl_pipeline.augment.draw import ViewSampler, num_draws
from ssl_pipeline.augment.operations.base import Channels
from ssl_pipeline.augment.photometric import apply_photometric
from ssl_pipeline.augment.resample import crop_and_resize_batch
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import Batch
from ssl_pipeline.data.bad_samples import BadSample

# V views of each of B images, P draws of the operations, S pixels, L patches

Integers = NDArray[np.int64]


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


@dataclass(frozen=True)
class DecodedImages:
    """B images that are not cropped yet.

    pixels: flat, 8 bits; holds the images where `table` says, maybe others too.
    boxes, flips, sizes: of the views of each group, (V,B,4), (V,B) and in pixels; they stay on the host.
    """

    pixels: Tensor
    table: ImageTable
    boxes: Mapping[str, Integers]
    flips: Mapping[str, NDArray[np.bool_]]
    sizes: Mapping[str, int]

    def clone(self) -> DecodedImages:
        """The same in memory of its own: of the pixels just those of its images."""
        return DecodedImages(
            torch.cat([image_HWC.flatten() for image_HWC in self.table.views(self.pixels)]),
            ImageTable.dense(self.table.heights.copy(), self.table.widths.copy()),
            {name: boxes_VB4.copy() for name, boxes_VB4 in self.boxes.items()},
            {name: flips_VB.copy() for name, flips_VB in self.flips.items()},
            self.sizes,
        )

    def crop(self, name: str, *, interpolation: str) -> Tensor:
        """The crops (V,B,3,S,S) of a group in [0, 255], where the pixels are.

        On an accelerator they are float32, not rounded. On a CPU they are uint8, bit for bit those that workers would
        have made: torch's 8-bit kernel takes a fifth of the time there (at 32 pixels about the same).
        """
        boxes_VB4, flips_VB, size, table = self.boxes[name], self.flips[name], self.sizes[name], self.table
        if self.pixels.device.type != "cpu":
            images = self.pixels, table.offsets, table.heights, table.widths
            return crop_and_resize_batch(*images, boxes_VB4, flips_VB, size=size, interpolation=interpolation)
        crops_VBHWC = torch.empty((*flips_VB.shape, size, size, 3), dtype=torch.uint8)
        crop_images(table.views(self.pixels), boxes_VB4, flips_VB, interpolation=interpolation, out=crops_VBHWC)
        return crops_VBHWC.movedim(-1, 2)


@dataclass(frozen=True)
class Notes:
    """What a reader says about the tensors that it has filled.

    bad: the samples that are replaced by others. sizes: of the views of each group, in pixels.
    used: how many bytes the decoded images take; displaced: pixels of further ones that found no room behind them.
    """

    bad: list[BadSample]
    sizes: Mapping[str, int]
    used: int = 0
    displaced: NDArray[np.uint8] | None = None


@dataclass
class StreamBatch:
    """One process's share of a micro-batch: V views of each of B images, before the operations on their colours.

    crops: (V,B,3,S,S) uint8 of each group, channels-last in memory; or none, and `images` to cut them out of.
    draws: (V,B,P) float32 of each group, the numbers for its operations. masks: (V,B,L) bool of those that have some.
    labels: (B,) int64, -1 where an image has none; or soft ones (B,C) float32.
    sample_ids: (B,) int64. bad: the samples that are replaced by others.
    labelled: a batch of the labelled set, if there is one.
    masked: (M,) int64 of each group with masks, where they are True when flattened; `to` finds them on the host.
    """

    draws: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    labels: Tensor
    sample_ids: Tensor
    bad: list[BadSample]
    crops: Mapping[str, Tensor] = field(default_factory=dict)
    images: DecodedImages | None = None
    labelled: StreamBatch | None = None
    masked: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def over(cls, tensors: Mapping[str, Tensor], notes: Notes) -> StreamBatch:
        """What a reader has left in tensors of the names of its layout; the batch consists of views of them."""
        parts: dict[str, dict[str, Tensor]] = {"crops": {}, "boxes": {}, "flips": {}, "draws": {}, "masks": {}}
        for key, tensor in tensors.items():
            part, _, group = key.partition(".")
            if group:
                parts[part][group] = tensor
        return cls(
            parts["draws"],
            parts["masks"],
            tensors["labels"],
            tensors["sample_ids"],
            notes.bad,
            {name: crops_VBHWC.movedim(-1, 2) for name, crops_VBHWC in parts["crops"].items()},
            _decoded(tensors, parts["boxes"], parts["flips"], notes) if "pixels" in tensors else None,
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> StreamBatch:
        """The same batch on a device; labels and sample ids, which outlive a step, are copies in any case."""
        # copies to other devices are synchronous anyway
        non_blocking = non_blocking and torch.device(device).type == "cuda"

        def moved(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}

        images = self.images
        if images is not None:
            images = replace(images, pixels=images.pixels.to(device, non_blocking=non_blocking))
        masked = self.masked or {name: _where_true(masks, pinned=non_blocking) for name, masks in self.masks.items()}
        return StreamBatch(
            moved(self.draws),
            moved(self.masks),
            self.labels.to(device, non_blocking=non_blocking, copy=True),
            self.sample_ids.to(device, non_blocking=non_blocking, copy=True),
            self.bad,
            moved(self.crops),
            images,
            self.labelled and self.labelled.to(device, non_blocking=non_blocking),
            moved(masked),
        )

    def tensors(self) -> list[Tensor]:
        """All tensors on the device of the batch."""
        groups = (self.draws, self.masks, self.crops, self.masked)
        found = [self.labels, self.sample_ids, *(tensor for group in groups for tensor in group.values())]
        found += [] if self.images is None else [self.images.pixels]
        return found + ([] if self.labelled is None else self.labelled.tensors())

    def clone(self) -> StreamBatch:
        """The same batch in memory of its own, for callers that keep it."""
        return StreamBatch(
            {name: draws_VBP.clone() for name, draws_VBP in self.draws.items()},
            {name: masks_VBL.clone() for name, masks_VBL in self.masks.items()},
            self.labels.clone(),
            self.sample_ids.clone(),
            self.bad,
            {name: crops_VBCHW.clone() for name, crops_VBCHW in self.crops.items()},
            self.images and self.images.clone(),
            self.labelled and self.labelled.clone(),
            {name: places_M.clone() for name, places_M in self.masked.items()},
        )

    def cropped(self, groups: Mapping[str, ViewGroup]) -> Mapping[str, Tensor]:
        """The crops (V,B,3,S,S) of each group in [0, 255], uint8 or float32, on the batch's device."""
        if self.images is None:
            return self.crops
        return {name: self.images.crop(name, interpolation=groups[name].interpolation) for name in self.draws}


def _where_true(masks_VBL: Tensor, *, pinned: bool) -> Tensor:
    """(M,): where the flattened masks are True, in order; pinned for an asynchronous copy."""
    places_M = masks_VBL.flatten().nonzero().flatten()
    return places_M.pin_memory() if pinned else places_M


def _decoded(
    tensors: Mapping[str, Tensor], boxes: Mapping[str, Tensor], flips: Mapping[str, Tensor], notes: Notes
) -> DecodedImages:
    heights_B, widths_B = tensors["sizes"].numpy().T
    row = 3 * int(widths_B.max())  # one row past the end is read, and ignored
    pixels = tensors["pixels"][: notes.used + row]
    if notes.displaced is not None:
        pixels = torch.cat((pixels[: notes.used], torch.from_numpy(notes.displaced), pixels.new_zeros(row)))
    return DecodedImages(
        pixels,
        ImageTable.dense(heights_B, widths_B),
        {name: boxes_VB4.numpy() for name, boxes_VB4 in boxes.items()},
        {name: flips_VB.numpy() for name, flips_VB in flips.items()},
        notes.sizes,
    )


def drawn_layout(
    sampler: ViewSampler, num_images: int, sizes: Mapping[str, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The part of a reader's layout that is the same wherever crops are cut out: draws and masks of each group."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, group in sampler.groups.items():
        layout[f"draws.{name}"] = (group.count, num_images, num_draws(group)), torch.float32
        if name in sampler.masks:
            layout[f"masks.{name}"] = (group.count, num_images, sampler.num_patches(name, sizes[name])), torch.bool
    return layout


def make_batch(
    images: StreamBatch, groups: Mapping[str, ViewGroup], *, mean: Channels, std: Channels, compile: bool = False
) -> Batch:
    """The views and masks of a batch from the stream, cropped and augmented on the device that it is on.

    compile: see apply_photometric.
    """
    views = {}
    for name, crops_VBCHW in images.cropped(groups).items():
        group, draws_VBP = groups[name], images.draws[name]
        views[name] = apply_photometric(
            crops_VBCHW, draws_VBP, group, mean=group.mean or mean, std=group.std or std, compile=compile
        )
    labelled = None
    if images.labelled is not None:
        labelled = make_batch(images.labelled, groups, mean=mean, std=std, compile=compile)
    return Batch(views, images.labels, images.sample_ids, dict(images.masks), labelled, dict(images.masked))
