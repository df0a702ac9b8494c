"""Shards -> batches of 8-bit crops: an endless stream whose whole state is one position."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ssl_pipeline.augment.crops import crop_and_resize, crop_boxes
from ssl_pipeline.augment.photometric import draw_parameters
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.config import Config
from ssl_pipeline.data.bad_samples import BadSample
from ssl_pipeline.data.decode import DecodeError, decode_image
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.sampling import SUBSTITUTE, Order, hash64, rank_positions, uniforms
from ssl_pipeline.data.shards import ShardIndex
from ssl_pipeline.data.workers import read_batches

# V views of each of B images, P photometric parameters, S pixels
MAX_SUBSTITUTES = 16
CHUNK_PIXELS = 16_000_000  # decoded and not yet cropped, per worker: 48 MB whatever the batch size


class LabelledConfig(Config):
    """Where a semi-supervised method's labelled images come from; they are read as `data` says.

    They may be fewer than a batch, which then holds some of them more than once. One that cannot be decoded always
    stops the run.
    """

    shards: str
    """Directory of WebDataset shards with labels; data_tools.split_labels makes them."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Labelled images per process and micro-batch, beside data.batch_size unlabelled ones."""


class DataConfig(Config):
    """Where the images come from and how they are read."""

    shards: str
    """Directory of WebDataset shards, a pattern such as DIR/train-*.tar, or a URL such as s3://bucket/train."""
    cache_dir: Path | None = None
    """Where the shards of a URL are kept; by default in the user's cache, `ssl_pipeline/shards`."""
    cache_gb: Annotated[float, Field(gt=0)] = 50.0
    """Most that is kept there, in GB; what was used longest ago makes room."""
    batch_size: Annotated[int, Field(ge=1)]
    """Images per process and micro-batch."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Reading processes per training process; 0 reads in the training process itself."""
    bad_samples: Literal["stop", "substitute"] = "stop"
    """What to do with an image that cannot be decoded: stop, or take another one and note it."""
    bad_sample_budget: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of images that may be substituted before the run ends."""
    block_shards: Annotated[int, Field(ge=1)] = 16
    """Samples are shuffled within blocks of this many shards; the shards themselves are shuffled as a whole."""
    prefetch: Annotated[int, Field(ge=1)] = 2
    """Batches that each worker prepares ahead."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from red, green and blue in [0, 1]; ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """What red, green and blue are divided by after that; ImageNet's."""
    labelled: LabelledConfig | None = None
    """A second, labelled set of images, for methods such as FixMatch."""


@dataclass
class CropBatch:
    """One process's share of a micro-batch, ready for the photometric part on the device.

    Per group crops (V,B,3,S,S) uint8 and photometric parameters (V,B,P) float32; labels (B,) int64, -1 = none; index
    (B,) int64, the sample ids; `bad` lists the samples that others stand in for; `labelled` is a batch of the labelled
    set, if there is one.
    """

    crops: dict[str, Tensor]
    parameters: dict[str, Tensor]
    labels: Tensor
    index: Tensor
    bad: list[BadSample]
    labelled: "CropBatch | None" = None

    def pin_memory(self) -> "CropBatch":
        """The same batch in page-locked memory, from which copies to a GPU run in the background."""
        return replace(
            self,
            crops={group: crops.pin_memory() for group, crops in self.crops.items()},
            parameters={group: parameters.pin_memory() for group, parameters in self.parameters.items()},
            labels=self.labels.pin_memory(),
            index=self.index.pin_memory(),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "CropBatch":
        """The same batch on a device."""
        return replace(
            self,
            crops={group: crops.to(device, non_blocking=non_blocking) for group, crops in self.crops.items()},
            parameters={
                group: values.to(device, non_blocking=non_blocking) for group, values in self.parameters.items()
            },
            labels=self.labels.to(device, non_blocking=non_blocking),
            index=self.index.to(device, non_blocking=non_blocking),
            labelled=self.labelled and self.labelled.to(device, non_blocking=non_blocking),
        )


def open_stream(
    index: ShardIndex,
    groups: Mapping[str, ViewGroup],
    config: DataConfig,
    *,
    seed: int,
    position: int,
    rank: int,
    world_size: int,
    batches: int | None = None,
    repeat: bool = False,
) -> Iterator[CropBatch]:
    """This rank's share of each micro-batch from `position` on: `batches` of them, or without end.

    Item m holds its slice of positions [position + m*G, position + (m+1)*G), G = batch_size * world_size. What it
    holds depends on (seed, position) alone: not on workers, nor on how ranks share the positions. Data sets smaller
    than G are refused, unless samples may `repeat` within a batch.
    """
    step = config.batch_size * world_size
    if step > len(index) and not repeat:
        processes = f" on {world_size} processes" if world_size > 1 else ""
        raise DataError(
            f"data.batch_size={config.batch_size}{processes} is larger than the data set: '{index.source}' has "
            f"{len(index)} images. Take at most {len(index) // world_size}."
        )
    index.check_cache(config.block_shards)
    starts = count(position, step) if batches is None else range(position, position + batches * step, step)
    slices = (rank_positions(start, rank=rank, world_size=world_size, batch_size=config.batch_size) for start in starts)
    reader = CropReader(index, groups, config, seed=seed)
    pin_memory = torch.cuda.is_available()
    return read_batches(reader, slices, workers=config.workers, prefetch=config.prefetch, pin_memory=pin_memory)


class CropReader:
    """Positions of the endless stream -> their crops; the part that runs in the workers."""

    def __init__(self, index: ShardIndex, groups: Mapping[str, ViewGroup], config: DataConfig, *, seed: int) -> None:
        self.index = index
        self.groups = dict(groups)
        self.seed = seed
        self.substitutes = config.bad_samples == "substitute"
        self.order = Order(index.shard_counts, seed, config.block_shards)

    def __call__(self, positions: Sequence[int]) -> CropBatch:
        """Read, decode and crop; raises DataError for what cannot be read or, under `stop`, decoded."""
        epochs_B, samples_B = self.order.locate(positions)
        uniforms_of = {name: self._uniforms(name, group, epochs_B, samples_B) for name, group in self.groups.items()}
        crops = {
            name: torch.empty((group.count, len(samples_B), 3, group.size, group.size), dtype=torch.uint8)
            for name, group in self.groups.items()
        }
        labels, taken, bad = list[int](), list[int](), list[BadSample]()
        for images in self._decoded(samples_B.tolist(), labels, taken, bad):
            here = slice(len(taken) - len(images), len(taken))
            for name, group in self.groups.items():
                _crop(images, uniforms_of[name][:, here], group, crops[name][:, here])
        parameters = {
            name: torch.from_numpy(draw_parameters(uniforms_of[name], group)) for name, group in self.groups.items()
        }
        return CropBatch(crops, parameters, torch.tensor(labels), torch.tensor(taken), bad)

    def _uniforms(
        self, name: str, group: ViewGroup, epochs_B: NDArray[np.int64], samples_B: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        # the stream is the group's name: adding a group changes no other
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return uniforms(self.seed, epochs_B, samples_B, views=group.count, count=group.num_uniforms(), stream=stream)

    def _decoded(
        self, samples: list[int], labels: list[int], taken: list[int], bad: list[BadSample]
    ) -> Iterator[list[Tensor]]:
        """Images in chunks of bounded size; labels, ids and bad samples are appended on the way."""
        images, pixels = list[Tensor](), 0
        for sample in samples:
            image, label, actual = self._decode(sample, bad)
            labels.append(label)
            taken.append(actual)
            images.append(image)
            pixels += image.shape[0] * image.shape[1]
            if pixels >= CHUNK_PIXELS:
                yield images
                images, pixels = [], 0
        if images:
            yield images

    def _decode(self, sample: int, bad: list[BadSample]) -> tuple[Tensor, int, int]:
        """Image (H,W,3), label and id of the sample, or of the first of its substitutes that can be decoded."""
        for attempt in range(1, MAX_SUBSTITUTES + 1):
            raw = self.index.read(sample)
            try:
                image = torch.from_numpy(decode_image(raw.image))
            except DecodeError as error:
                if not self.substitutes:
                    raise DataError(
                        f"Cannot decode {raw.location}: {error}. "
                        "data.bad_samples=substitute takes another image instead."
                    ) from None
                substitute = int(hash64(self.seed, SUBSTITUTE, sample, attempt) % np.uint64(len(self.index)))
                bad.append(BadSample(sample, raw.shard, raw.key, raw.byte, str(error), substitute))
                sample = substitute
                continue
            return image, -1 if raw.label is None else raw.label, sample
        raise DataError(f"Cannot decode {raw.location}, nor any of {MAX_SUBSTITUTES - 1} samples before it.")


def _crop(images: list[Tensor], uniforms_VBU: NDArray[np.float64], group: ViewGroup, crops_VBCHW: Tensor) -> None:
    heights_B = np.array([image.shape[0] for image in images])
    widths_B = np.array([image.shape[1] for image in images])
    boxes_VB4, flips_VB = crop_boxes(uniforms_VBU, heights_B, widths_B, group)
    boxes, flips = boxes_VB4.tolist(), flips_VB.tolist()
    for number, image in enumerate(images):
        for view in range(group.count):
            crop_and_resize(
                image,
                boxes[view][number],
                flip=flips[view][number],
                interpolation=group.interpolation,
                out=crops_VBCHW[view, number],
            )
