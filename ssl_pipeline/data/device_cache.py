"""A whole data set, decoded once and kept on the training device: no reading processes, and no image ever travels.

The order, the crops and the colours are those of the stream that reads from shards: a batch is a pure function of the
seed and the position.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssl_pipeline.augment.draw import ViewSampler
from ssl_pipeline.config import bar_interval
from ssl_pipeline.data.bad_samples import BadSample
from ssl_pipeline.data.batches import DecodedImages, ImageTable, StreamBatch
from ssl_pipeline.data.decode_reader import DecodedReader
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.samples import Integers, Samples, labels_layout
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.shards.overlay import Labels
from ssl_pipeline.data.workers.pool import read_batches
from ssl_pipeline.machine import free_bytes

SLOT_BYTES = 2**24  # decoded by a worker at a time
SHARE = 0.5  # of the memory that this process may still take, for the images; the rest is for training


@dataclass(frozen=True)
class CachedImages:
    """N decoded images in a flat buffer on a device; labels (N,) or (N,C) and ids (N,) of what is there; the damage."""

    pixels: Tensor
    images: ImageTable
    labels: Labels
    sample_ids: Integers
    bad: dict[int, list[BadSample]]


def cached_stream(
    samples: Samples,
    sampler: ViewSampler,
    positions_of: Callable[[int], Sequence[int]],
    *,
    batches: int | None,
    device: torch.device,
    workers: int,
    rank: int,
    keepalive: Callable[[], None],
) -> Iterator[StreamBatch]:
    """The images at the positions of batch 0, 1, ...; of `batches`, or without end. They are decoded at the first."""
    cache = None
    for number in itertools.count() if batches is None else range(batches):
        cache = cache or decode_all(samples, device=device, workers=workers, rank=rank, keepalive=keepalive)
        yield _draw_batch(cache, samples, sampler, positions_of(number))


def _draw_batch(cache: CachedImages, samples: Samples, sampler: ViewSampler, positions: Sequence[int]) -> StreamBatch:
    epochs_B, samples_B = samples.locate(positions)
    images = cache.images.of(samples_B)
    drawn = sampler.draw(
        positions, epochs_B=epochs_B, samples_B=samples_B, heights_B=images.heights, widths_B=images.widths
    )

    def prepared(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if cache.pixels.is_cuda else tensor

    boxes = {name: of.boxes for name, of in drawn.items()}
    flips = {name: of.flips for name, of in drawn.items()}
    return StreamBatch(
        {name: prepared(of.draws) for name, of in drawn.items()},
        {name: prepared(of.masks) for name, of in drawn.items() if of.masks is not None},
        prepared(cache.labels[samples_B]),
        prepared(cache.sample_ids[samples_B]),
        [bad for sample in samples_B.tolist() for bad in cache.bad.get(sample, ())],
        images=DecodedImages(cache.pixels, images, boxes, flips, sampler.sizes(positions)),
    )


def decode_all(
    samples: Samples, *, device: torch.device, workers: int, rank: int, keepalive: Callable[[], None]
) -> CachedImages:
    """Decode every sample of the index onto the device, under a progress bar and with a keepalive now and then.

    A sample that cannot be decoded points to the pixels of its replacement. Raises DataError if the
    images do not fit there, before anything is decoded.
    """
    index = samples.index
    heights_N, widths_N = index.sizes().T
    images = ImageTable.dense(heights_N, widths_N)
    total = int(index.shard_pixel_bytes.sum())
    pixels = _reserve(index, device, needed=total + 3 * index.widest)  # one row past the end is read, and ignored
    in_order = Samples(index, None, seed=samples.seed, substitutes=samples.substitutes, max_pixels=samples.max_pixels)
    step = min(max(SLOT_BYTES * len(index) // max(total, 1), 1), 1024, len(index))
    no_views = ViewSampler({}, {}, samples.seed, global_batch=step)
    reader = DecodedReader(in_order, no_views, batch_size=step)
    read = read_batches(
        reader,
        lambda number: range(number * step, min((number + 1) * step, len(index))),
        batches=math.ceil(len(index) / step),
        workers=workers,
    )
    shape, dtype = labels_layout(index, len(index))
    labels, ids = torch.empty(shape, dtype=dtype).numpy(), np.empty(len(index), np.int64)
    bad, done = dict[int, list[BadSample]](), 0
    with tqdm(
        total=len(index),
        desc=f"decoding {index.called}",
        unit="image",
        leave=False,
        delay=1.0,
        mininterval=bar_interval(),
        disable=rank > 0,
    ) as bar:
        for tensors, notes in read:
            batch = StreamBatch.over(tensors, notes)
            here = slice(done, done + len(batch.labels))
            labels[here], ids[here] = batch.labels.numpy(), batch.sample_ids.numpy()
            _copy_images(batch, images, index, out=pixels, first=done)
            done = here.stop
            _add_chains(bad, batch.bad)
            bar.update(len(batch.labels))
            keepalive()
    return CachedImages(pixels, images.of(ids), labels, ids, bad)


def _copy_images(batch: StreamBatch, images: ImageTable, index: ShardIndex, *, out: Tensor, first: int) -> None:
    """Copy a batch that begins with image `first` to where `images` says, except replacements."""
    numbers_B = np.arange(first, first + len(batch.sample_ids))
    own_B = batch.sample_ids.numpy() == numbers_B
    assert batch.images is not None
    places, pixels, found = images.of(numbers_B), batch.images.pixels, batch.images.table
    differs_B = own_B & ((places.heights != found.heights) | (places.widths != found.widths))
    if differs_B.any():
        raise DataError(
            f"The index of '{index.called}' has another size for image {numbers_B[differs_B][0]} than the decoded one. "
            "Delete the index; it is rebuilt at the next start."
        )
    if own_B.all():
        start, used = places.offsets[0], (3 * found.heights * found.widths).sum()
        out[start : start + used].copy_(pixels[:used])
        return
    for number, (source, target) in enumerate(zip(found.views(pixels), places.views(out), strict=True)):
        if own_B[number]:
            target.copy_(source)


def _add_chains(bad: dict[int, list[BadSample]], entries: Sequence[BadSample]) -> None:
    """Sort damaged samples by the one that was asked for: the substitute of one may be the next."""
    asked, expected = -1, -1
    for entry in entries:
        if entry.sample != expected:
            asked = entry.sample
        bad.setdefault(asked, []).append(entry)
        expected = entry.substitute


def _reserve(index: ShardIndex, device: torch.device, *, needed: int) -> Tensor:
    free = free_bytes(device)
    if free is not None and needed > SHARE * free:
        raise DataError(
            f"data.cache=true needs {needed / 1e9:.3g} GB in each process for the {len(index)} decoded images of "
            f"'{index.called}', more than half of the {free / 1e9:.3g} GB that one may still take on {device}. "
            "Leave it out: data.crop_on=device takes the cropping off the workers just as well."
        )
    return torch.empty(needed, dtype=torch.uint8, device=device)
