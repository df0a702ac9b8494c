"""A whole data set, decoded once and kept on the training device: no reading processes, and no image ever travels.

The order, the crops and the colours are those of the stream that reads from shards: a batch is a pure function of the
seed and the position.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssl_pipeline.augment.draw import ViewSampler
from ssl_pipeline.data.bad_samples import BadSample
from ssl_pipeline.data.decode_reader import DecodedBatch, DecodedReader, ImageTable, estimate_image_bytes
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.samples import Integers, Samples
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.workers.pool import read_batches
from ssl_pipeline.machine import free_bytes

SLOT_BYTES = 2**24  # decoded by a worker at a time
SHARE = 0.5  # of the memory that this process may still take, for the images; the rest is for training


@dataclass(frozen=True)
class CachedImages:
    """N decoded images in a flat buffer on a device; labels (N,), ids (N,) of what is there, and what is damaged."""

    pixels: Tensor
    images: ImageTable
    labels: Integers
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
) -> Iterator[DecodedBatch]:
    """The images at the positions of batch 0, 1, ...; of `batches`, or without end. They are decoded at the first."""
    cache = None
    for number in itertools.count() if batches is None else range(batches):
        cache = cache or decode_all(samples, device=device, workers=workers, rank=rank, keepalive=keepalive)
        yield _draw_batch(cache, samples, sampler, positions_of(number))


def _draw_batch(cache: CachedImages, samples: Samples, sampler: ViewSampler, positions: Sequence[int]) -> DecodedBatch:
    epochs_B, samples_B = samples.locate(positions)
    of_all = cache.images
    images = ImageTable(of_all.offsets[samples_B], of_all.heights[samples_B], of_all.widths[samples_B])
    drawn = sampler.draw(
        positions, epochs_B=epochs_B, samples_B=samples_B, heights_B=images.heights, widths_B=images.widths
    )

    def prepared(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if cache.pixels.is_cuda else tensor

    return DecodedBatch(
        cache.pixels,
        images,
        {name: group.boxes for name, group in drawn.items()},
        {name: group.flips for name, group in drawn.items()},
        {name: prepared(group.parameters) for name, group in drawn.items()},
        {name: prepared(group.masks) for name, group in drawn.items() if group.masks is not None},
        prepared(cache.labels[samples_B]),
        prepared(cache.sample_ids[samples_B]),
        [bad for sample in samples_B.tolist() for bad in cache.bad.get(sample, ())],
    )


def decode_all(
    samples: Samples, *, device: torch.device, workers: int, rank: int, keepalive: Callable[[], None]
) -> CachedImages:
    """Decode every sample of the index onto the device, under a progress bar and with a keepalive now and then.

    Raises DataError if the images do not fit there, from an estimate before anything is decoded.
    """
    index = samples.index
    estimate = estimate_image_bytes(index)
    pixels = _Pixels(index, device, needed=estimate.of(len(index)))
    in_order = Samples(index, None, seed=samples.seed, substitutes=samples.substitutes)
    step = min(max(int(SLOT_BYTES / max(estimate.mean, 1)), 1), 1024, len(index))
    no_views = ViewSampler({}, {}, samples.seed, global_batch=step)
    reader = DecodedReader(in_order, no_views, batch_size=step, slot_bytes=estimate.of(step))
    read = read_batches(
        reader,
        lambda number: range(number * step, min((number + 1) * step, len(index))),
        batches=math.ceil(len(index) / step),
        workers=workers,
    )
    heights, widths, labels, ids = (np.empty(len(index), np.int64) for _ in range(4))
    bad, done = dict[int, list[BadSample]](), 0
    with tqdm(
        total=len(index), desc=f"decoding {index.source}", unit="image", leave=False, delay=1.0, disable=rank > 0
    ) as bar:
        for slot, decoded in read:
            here, batch = slice(done, done + decoded.num_images), reader.batch(slot, decoded)
            done += decoded.num_images
            pixels.append(batch.pixels[: decoded.used], done)
            heights[here], widths[here] = batch.images.heights, batch.images.widths
            labels[here], ids[here] = batch.labels.numpy(), batch.sample_ids.numpy()
            _add_chains(bad, decoded.bad)
            bar.update(decoded.num_images)
            keepalive()
    whole = pixels.whole(row=3 * int(widths.max()))
    return CachedImages(whole, ImageTable.dense(heights, widths), labels, ids, bad)


def _add_chains(bad: dict[int, list[BadSample]], entries: Sequence[BadSample]) -> None:
    """Sort damaged samples by the one that was asked for: the substitute of one may be the next."""
    asked, expected = -1, -1
    for entry in entries:
        if entry.sample != expected:
            asked = entry.sample
        bad.setdefault(asked, []).append(entry)
        expected = entry.substitute


class _Pixels:
    """A flat buffer on a device that grows where the estimate was too low."""

    def __init__(self, index: ShardIndex, device: torch.device, *, needed: int) -> None:
        self.index, self.device = index, device
        self.used = 0
        self.buffer = self._reserve(needed)

    def append(self, pixels: Tensor, num_images: int) -> None:
        """Those of the next images, up to `num_images` of the set."""
        end = self.used + len(pixels)
        if end > len(self.buffer):
            self._grow(math.ceil(1.05 * end * len(self.index) / num_images))
        self.buffer[self.used : end].copy_(pixels)
        self.used = end

    def whole(self, *, row: int) -> Tensor:
        """The pixels and `row` bytes more, which are read past the end and count for nothing."""
        if self.used + row > len(self.buffer):
            self._grow(self.used + row)
        return self.buffer[: self.used + row]

    def _grow(self, needed: int) -> None:
        larger = self._reserve(needed)
        larger[: self.used] = self.buffer[: self.used]
        self.buffer = larger

    def _reserve(self, needed: int) -> Tensor:
        free = free_bytes(self.device)
        if free is not None and needed > SHARE * free:
            raise DataError(
                f"data.cache=true needs about {needed / 1e9:.3g} GB in each process for the {len(self.index)} decoded "
                f"images of '{self.index.source}', more than half of the {free / 1e9:.3g} GB that one may still take "
                f"on {self.device}. Leave it out: data.crop_on=device takes the cropping off the workers just as well."
            )
        return torch.empty(needed, dtype=torch.uint8, device=self.device)
