"""Shards -> batches of images: an endless stream whose whole state is one position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count, starmap
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from ssl_pipeline.augment.draw import ViewSampler
from ssl_pipeline.augment.operations.base import IMAGENET_MEAN, IMAGENET_STD, Deviation, Mean
from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.config import BatchSize, Config, MayChange, Processes
from ssl_pipeline.data.batches import StreamBatch
from ssl_pipeline.data.crop_reader import CropReader
from ssl_pipeline.data.decode import MAX_PIXELS
from ssl_pipeline.data.decode_reader import DecodedReader
from ssl_pipeline.data.device_cache import cached_stream
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.order import Order, rank_positions
from ssl_pipeline.data.samples import Samples
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.subset import open_subset
from ssl_pipeline.data.workers.pool import read_batches

__all__ = ["DataConfig", "LabelledConfig", "StreamBatch", "open_images", "open_stream"]


class LabelledConfig(Config):
    """Where a semi-supervised method's labelled images come from; they are read as `data` says.

    A separate worker reads them, if data.workers is not 0. They may be fewer than a batch, which then holds some of
    them more than once. One that cannot be decoded always stops the run.
    """

    shards: MayChange[str]
    """Directory of WebDataset shards with labels; data_tools.split_labels makes them."""
    keep: MayChange[Path | None] = None
    """Take only these images of the shards, as data.keep."""
    labels: MayChange[Path | None] = None
    """Labels in place of those in the shards, as data.labels."""
    batch_size: MayChange[BatchSize] = 64
    """Labelled images per process and micro-batch, in addition to data.batch_size unlabelled ones."""


class DataConfig(Config):
    """Where the images come from and how they are read."""

    shards: MayChange[str | tuple[str, ...]]
    """Directory of WebDataset shards, a pattern such as DIR/train-*.tar or DIR/train-{000..099}.tar, a list of such
    places, or a URL such as s3://bucket/train."""
    image_key: str | None = None
    """Extension of the image where samples have several, such as input.jpg; a;b takes the first that is there."""
    keep: MayChange[Path | None] = None
    """Take only the images of the shards whose numbers are in FILE.npy; FILE.json next to it names the set."""
    labels: MayChange[Path | None] = None
    """Labels in place of those in the shards: FILE.npy with one for each image of the whole set, and FILE.json."""
    cache_dir: MayChange[Path | None] = None
    """Where the shards of a URL are kept; by default in the user's cache, `ssl_pipeline/shards`."""
    cache_gb: MayChange[Annotated[float, Field(gt=0, le=1e9)]] = 50.0
    """Limit of what is kept there, in GB; the least recently used is removed first."""
    batch_size: MayChange[BatchSize]
    """Images per process and micro-batch."""
    workers: MayChange[Processes] = 2
    """Reading processes per training process; 0 reads in the training process itself. If their batches do not fit into
    a quarter of the free memory, fewer are started, with a warning."""
    crop_on: MayChange[Literal["auto", "worker", "device"]] = "auto"
    """Where crops are cut out and resized. worker: in the reading processes, rounded to 8 bits. device: a whole batch
    at once where the model is, on a GPU not rounded; the reading processes only decode. auto: the device if a GPU."""
    cache: MayChange[bool] = False
    """Whether all images are decoded once at the start and stay on the device, as raw pixels, for sets of small images;
    each process holds all of them. Nothing is read after that, so workers are no longer used."""
    bad_samples: MayChange[Literal["stop", "substitute"]] = "stop"
    """What to do with an image that cannot be decoded: stop, or take another one and note it."""
    bad_sample_budget: MayChange[Annotated[float, Field(ge=0, le=1)]] = 0.01
    """Largest share of images that may be substituted before the run ends, and of samples that may be passed over for
    want of one image (10 are always allowed, unless this is 0)."""
    max_pixels: Annotated[int, Field(ge=1, le=MAX_PIXELS)] = MAX_PIXELS
    """Pixels of an image above which it counts as undecodable; a bound on memory and time per image."""
    block_shards: Annotated[int, Field(ge=1, le=10**6)] = 16
    """Samples are shuffled within blocks of this many shards; the shards themselves are shuffled as a whole."""
    prefetch: MayChange[Annotated[int, Field(ge=1, le=1024)]] = 2
    """Batches that each worker prepares ahead, where there is memory for them."""
    mean: Mean = IMAGENET_MEAN
    """Subtracted from red, green and blue in [0, 1]; ImageNet's."""
    std: Deviation = IMAGENET_STD
    """What red, green and blue are divided by after that; ImageNet's."""
    labelled: LabelledConfig | None = None
    """A second, labelled set of images, for methods such as FixMatch."""

    @model_validator(mode="after")
    def _cache_crops_on_the_device(self) -> DataConfig:
        if self.cache and self.crop_on == "worker":
            raise ValueError(
                "cache keeps decoded images on the device, which then crops them. Leave crop_on=worker out, or cache."
            )
        return self

    def crops_on_device(self, device: torch.device) -> bool:
        """Whether workers leave the cropping to a device."""
        return self.crop_on == "device" or (self.crop_on == "auto" and device.type == "cuda")


NO_MASKS: Mapping[str, MaskRule] = {}


def open_images(config: DataConfig, *, labelled: LabelledConfig | None = None) -> ShardIndex:
    """The images of a run, or those of its labelled set, as `keep` and `labels` leave them."""
    source = labelled or config
    return open_subset(
        source.shards,
        keep=source.keep,
        labels=source.labels,
        cache_dir=config.cache_dir,
        cache_gb=config.cache_gb,
        image_key=config.image_key,
        budget=config.bad_sample_budget,
        key="data.labelled" if labelled else "data",
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
    masks: Mapping[str, MaskRule] = NO_MASKS,
    accumulate: int = 1,
    step: int | None = None,
    size_seed: int | None = None,
    batches: int | None = None,
    repeat: bool = False,
    device: torch.device | str = "cpu",
    keepalive: Callable[[], None] = lambda: None,
    memory_share: float = 1.0,
) -> Iterator[StreamBatch]:
    """This rank's share of each micro-batch from `position` on: `batches` of them, or without end.

    Item m holds its slice of positions [position + m*G, position + (m+1)*G), G = batch_size * world_size. What it holds
    depends only on (seed, position): not on workers, nor on how ranks share the positions. Each `accumulate`
    micro-batches are an optimizer step, the first of them number `step` (default: by the position), whose views have
    sizes of their own, by `size_seed`, where a group has several (default: `seed`). `masks` has the rules of the groups
    whose views are masked. Without any groups no image is read. Data sets smaller than G are refused, unless samples
    may `repeat` within a batch. `device` is where batches will be taken, which decides where crops are cut out. A batch
    lasts until the next one is asked for, which may overwrite it; `clone()` keeps one for longer. The first may take
    long, where all images are decoded for it: `keepalive` is called meanwhile. `memory_share`: of the memory for
    batches, where streams share it.
    """
    micro_batch, device = config.batch_size * world_size, torch.device(device)
    if micro_batch > len(index) and not repeat:
        processes = f" on {world_size} processes" if world_size > 1 else ""
        raise DataError(
            f"data.batch_size={config.batch_size}{processes} is larger than the data set: '{index.called}' has "
            f"{len(index)} images. Take at most {len(index) // world_size}."
        )
    index.check_cache(config.block_shards)
    order = Order(index.shard_counts, seed, config.block_shards)
    substitutes = config.bad_samples == "substitute"
    samples = Samples(index, order, seed=seed, substitutes=substitutes, max_pixels=config.max_pixels)

    global_batch = micro_batch * accumulate
    first_step = position // global_batch if step is None else step
    sampler = ViewSampler(
        dict(groups),
        dict(masks),
        seed,
        global_batch,
        offset=position - first_step * global_batch,
        size_seed=seed if size_seed is None else size_seed,
    )

    def positions_of(batch: int) -> range:
        start = position + batch * micro_batch
        return rank_positions(start, rank=rank, world_size=world_size, batch_size=config.batch_size)

    if not groups:
        return _numbers_alone(samples, positions_of, batches=batches)
    if config.cache:
        return cached_stream(
            samples,
            sampler,
            positions_of,
            batches=batches,
            device=device,
            workers=config.workers,
            rank=rank,
            keepalive=keepalive,
        )
    make_reader = DecodedReader if config.crops_on_device(device) else CropReader
    reader = make_reader(samples, sampler, batch_size=config.batch_size)
    read = read_batches(
        reader,
        positions_of,
        batches=batches,
        workers=config.workers,
        prefetch=config.prefetch,
        memory_share=memory_share,
    )
    return starmap(StreamBatch.over, read)


def _numbers_alone(
    samples: Samples, positions_of: Callable[[int], range], *, batches: int | None
) -> Iterator[StreamBatch]:
    """Batches for a method that is shown no views of these images: their numbers, and -1 for labels; none is read."""
    for batch in count() if batches is None else range(batches):
        _, samples_B = samples.locate(positions_of(batch))
        sample_ids = torch.from_numpy(samples_B.copy())
        yield StreamBatch({}, {}, torch.full_like(sample_ids, -1), sample_ids, [])
