"""What a method remembers of each image of the set: made in `prepare`, where the number of images is known.

Reading changes nothing; `record` and `update` are called in `after_step`, with the rows of all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_pipeline.config import ConfigError

# Axes: B rows of a step, of all processes; C classes.
MAX_GIB = 2
"""Limit of a memory's size."""


class ScoreBoard(nn.Module):
    """The last class that each image was guessed to be with confidence (FlexMatch, Zhang et al., 2021,
    https://arxiv.org/abs/2110.08263).

    labels: (num_images,) int64, -1 = none yet. threshold: what a guess needs to be recorded, whatever its class.
    warmup: whether images without a label hold all thresholds down.
    """

    labels: Tensor

    def __init__(self, num_images: int, num_classes: int, *, threshold: float, warmup: bool = True) -> None:
        super().__init__()
        _check_size("ScoreBoard", num_images, 8)
        self.num_classes, self.threshold, self.warmup = num_classes, threshold, warmup
        self.register_buffer("labels", torch.full((num_images,), -1))

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """(C,): threshold * b / (2 - b) with b = the images of a class / those of the most frequent one.

        With `warmup` the images without a label count as a class here. Where nothing is recorded the threshold is 0.
        """
        one = torch.ones(1, device=self.labels.device).expand(len(self.labels))
        counts = one.new_zeros(self.num_classes + 1).scatter_add_(0, self.labels + 1, one)
        largest = counts.max() if self.warmup else counts[1:].max()
        share_C = counts[1:] / largest.clamp(min=1)
        return self.threshold * share_C / (2 - share_C)

    @torch.no_grad()
    def record(self, index: Tensor, confidence: Tensor, guesses: Tensor) -> None:
        """Write the guesses (B,) of the images `index` whose confidence is at least `threshold`; leave the rest.

        The rows of all processes; where an image comes twice, the last row that may be written counts.
        """
        rows = _last_rows(index, len(self.labels), counted=confidence >= self.threshold)
        kept = torch.where(rows < 0, self.labels[index], guesses[rows.clamp(min=0)])
        self.labels.index_copy_(0, index, kept)


class TemporalEnsemble(nn.Module):
    """A moving mean of the predictions of each image (Laine & Aila, 2016, https://arxiv.org/abs/1610.02242).

    predictions: (num_images, C). visits: (num_images,) int64, how often an image was updated.
    """

    predictions: Tensor
    visits: Tensor

    def __init__(self, num_images: int, num_classes: int, *, momentum: float) -> None:
        super().__init__()
        _check_size("TemporalEnsemble", num_images, 4 * num_classes + 8)
        self.momentum = momentum
        self.register_buffer("predictions", torch.zeros(num_images, num_classes))
        self.register_buffer("visits", torch.zeros(num_images, dtype=torch.long))

    @torch.no_grad()
    def targets(self, index: Tensor) -> Tensor:
        """(B, C): predictions / (1 - momentum^visits), the weighted mean of what was seen; zeros before a visit."""
        seen_B1 = 1 - self.momentum ** self.visits[index].to(self.predictions.dtype)[:, None]
        return self.predictions[index] / torch.where(seen_B1 > 0, seen_B1, 1)

    @torch.no_grad()
    def update(self, index: Tensor, probabilities: Tensor) -> None:
        """predictions = momentum * predictions + (1 - momentum) * probabilities (B, C) for the images `index` (B,).

        The rows of all processes; where an image comes twice, its last row counts and the visit is one.
        """
        last = probabilities[_last_rows(index, len(self.visits))].to(self.predictions.dtype)
        visits = self.visits[index] + 1
        self.predictions.index_copy_(0, index, torch.lerp(last, self.predictions[index], self.momentum))
        self.visits.index_copy_(0, index, visits)


def _last_rows(index_B: Tensor, num_images: int, *, counted: Tensor | None = None) -> Tensor:
    """(B,): for each row the last row of the same image, of those that are `counted`; -1 where there is none.

    Copying these rows, all rows of an image write the same, in whatever order a device writes them.
    """
    rows_B = torch.arange(len(index_B), device=index_B.device)
    if counted is not None:
        rows_B = torch.where(counted, rows_B, -1)
    return rows_B.new_full((num_images,), -1).scatter_reduce_(0, index_B, rows_B, "amax")[index_B]


def _check_size(name: str, num_images: int, bytes_per_image: int) -> None:
    gib = num_images * bytes_per_image / 2**30
    if gib > MAX_GIB:
        raise ConfigError(
            f"{name} remembers every image: {gib:.1f} GiB for {num_images:,} images, but {MAX_GIB} GiB are allowed. "
            "Use fewer images or classes, or a method that remembers no image."
        )
