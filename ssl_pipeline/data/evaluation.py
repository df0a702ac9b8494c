"""Images as evaluators see them: resized, centre-cropped, in the order of the index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_pipeline.augment.central_crop import Fit, Interpolation, central_crop, stretched
from ssl_pipeline.data.decode import DecodeError, decode_image
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.samples import ImageSource, Label, labels_layout
from ssl_pipeline.data.workers.pool import read_batches
from ssl_pipeline.data.workers.ring import Layout


class EvaluationSet(Dataset[tuple[Tensor, Label, int]]):
    """Sample i as (image (3,S,S) uint8, label or -1, i).

    The shorter side is resized to size*256/224 pixels, as the evaluations of DINO and SimCLR do (to `size` itself up to
    96 pixels), antialiased; then the central square is cut out. With fit="stretch" the whole image becomes the square.
    """

    def __init__(
        self, index: ImageSource, size: int, interpolation: Interpolation = "bicubic", fit: Fit = "crop"
    ) -> None:
        self.index = index
        self.size = size
        self.interpolation: Interpolation = interpolation
        self.view = central_crop if fit == "crop" else stretched

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, sample: int) -> tuple[Tensor, Label, int]:
        raw = self.index.read(sample)
        try:
            image_HWC = torch.from_numpy(decode_image(raw.image))
        except DecodeError as error:
            raise DataError(f"Cannot decode {raw.location}: {error}.") from None
        return self.view(image_HWC, self.size, self.interpolation), -1 if raw.label is None else raw.label, sample


class EvaluationReader:
    """The part of `evaluation_batches` that runs in the workers."""

    def __init__(self, images: EvaluationSet, batch_size: int) -> None:
        self.images = images
        self.batch_size = batch_size

    def layout(self, samples: Sequence[int] | None = None) -> Layout:
        """Images (B,3,S,S), labels (B,), or (B,C) where they are soft, and ids (B,)."""
        size, num_images = self.images.size, self.batch_size if samples is None else len(samples)
        return {
            "images": ((num_images, 3, size, size), torch.uint8),
            "labels": labels_layout(self.images.index, num_images),
            "ids": ((num_images,), torch.int64),
        }

    def __call__(self, samples: Sequence[int], batch: Mapping[str, Tensor]) -> None:
        for place, sample in enumerate(samples):
            image, batch["labels"].numpy()[place], batch["ids"][place] = self.images[sample]
            batch["images"][place].copy_(image)


def evaluation_batches(
    images: EvaluationSet, samples: Sequence[int], *, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (B,3,S,S), labels (B,) or (B,C) and ids (B,) of `samples`, in order; the last batch may be smaller.

    Images last until the next batch is asked for, which may overwrite them; labels and ids are copies. The errors of
    workers are one-line DataErrors.
    """

    def samples_of(batch: int) -> Sequence[int]:
        return samples[batch * batch_size : (batch + 1) * batch_size]

    batches = -(-len(samples) // batch_size)
    read = read_batches(EvaluationReader(images, batch_size), samples_of, batches=batches, workers=workers)
    return ((batch["images"], batch["labels"].clone(), batch["ids"].clone()) for batch, _ in read)
