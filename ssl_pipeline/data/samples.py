"""Positions of the endless stream -> decoded samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_pipeline.data.bad_samples import BadSample
from ssl_pipeline.data.decode import MAX_PIXELS, DecodeError, decode_image
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.order import Order
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.shards.rows import pixel_bytes
from ssl_pipeline.randomness import SUBSTITUTE, hash64

Integers = NDArray[np.int64]
Label = int | NDArray[np.float32]  # -1 = none; a row (C,) of soft labels
MAX_SUBSTITUTES = 16


class RawImage(Protocol):
    """The stored bytes of an image, its label (None without one), and a description of where it is."""

    @property
    def image(self) -> bytes: ...
    @property
    def label(self) -> int | NDArray[np.float32] | None: ...
    @property
    def location(self) -> str: ...


class ImageSource(Protocol):
    """Numbered images: shards, or files of another kind. checksums: identify these images."""

    @property
    def source(self) -> str: ...
    @property
    def checksums(self) -> list[str]: ...
    @property
    def num_soft_classes(self) -> int | None: ...
    def __len__(self) -> int: ...
    def read(self, sample: int) -> RawImage: ...


def labels_layout(index: ImageSource, num_images: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of the labels of a number of images: (B,) int64, or soft ones (B,C) float32."""
    if index.num_soft_classes is None:
        return (num_images,), torch.int64
    return (num_images, index.num_soft_classes), torch.float32


class Samples:
    """The samples of an index, in their own order or one after the other.

    `substitutes`: whether other samples replace those that cannot be decoded, or have more than `max_pixels`.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: Order | None,
        *,
        seed: int,
        substitutes: bool,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.index = index
        self.order = order
        self.seed = seed
        self.substitutes = substitutes
        self.max_pixels = max_pixels

    def locate(self, positions: Sequence[int]) -> tuple[Integers, Integers]:
        """Epoch and sample id at each position."""
        if self.order is not None:
            return self.order.locate(positions)
        epochs_B, samples_B = np.divmod(np.asarray(positions, dtype=np.int64), len(self.index))
        return epochs_B, samples_B

    def pixel_bytes(self, positions: Sequence[int]) -> Integers:
        """Bytes of the decoded image (B,) at each position, where none has to replace it."""
        return pixel_bytes(self.index.sizes(self.locate(positions)[1]))

    def usual_pixel_bytes(self) -> float:
        """Bytes of a decoded image, the mean over the block of shards that has the largest ones.

        The images of a batch come from one block, or two: few batches are much larger than this says.
        """
        bytes_S, counts_S = self.index.shard_pixel_bytes, self.index.shard_counts
        block_shards = 1 if self.order is None else self.order.block_shards
        heaviest = np.argsort(-bytes_S / np.maximum(counts_S, 1))[:block_shards]
        return float(bytes_S[heaviest].sum() / max(counts_S[heaviest].sum(), 1))

    def decode(
        self, sample: int, bad: list[BadSample], out: NDArray[np.uint8] | None = None
    ) -> tuple[NDArray[np.uint8], Label, int]:
        """Pixels (H,W,3), label and id of the sample, or of the first of its substitutes that decodes.

        Those that do not are appended to `bad`; without substitutes they are a DataError. The pixels lie at the start
        of `out`, a flat array, if it is given and they fit.
        """
        for attempt in range(1, MAX_SUBSTITUTES + 1):
            raw = self.index.read(sample)
            try:
                pixels_HWC = decode_image(raw.image, out, max_pixels=self.max_pixels)
            except DecodeError as error:
                if not self.substitutes:
                    raise DataError(
                        f"Cannot decode {raw.location}: {error}. "
                        "data.bad_samples=substitute takes another image instead, for a share of "
                        "data.bad_sample_budget of them at most."
                    ) from None
                substitute = int(hash64(self.seed, SUBSTITUTE, sample, attempt) % np.uint64(len(self.index)))
                file = self.index.origin(sample)
                bad.append(BadSample(sample, file, raw.shard, raw.key, raw.byte, str(error), substitute))
                sample = substitute
                continue
            return pixels_HWC, -1 if raw.label is None else raw.label, sample
        raise DataError(f"Cannot decode {raw.location}, nor any of {MAX_SUBSTITUTES - 1} samples before it.")
