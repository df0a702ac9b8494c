"""What a method is given: the views of some images, by the name of their group."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B images as named groups of views.

    views: group name -> (V, B, C, H, W), normalised; V is the group's count, and all views of a group have one size.
    labels: (B,) int64, -1 where an image has none.
    index: (B,) int64, the number of each image in the data set.
    labelled: a second batch, of labelled images, for semi-supervised methods.
    """

    views: dict[str, Tensor]
    labels: Tensor
    index: Tensor
    labelled: Batch | None = None
