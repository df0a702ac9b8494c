"""What can happen to a view at all, and where its numbers stand; what cannot is skipped without looking at them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

from torch import Tensor

from ssl_pipeline.augment.operations import Operation
from ssl_pipeline.augment.views import ViewGroup

Channels = tuple[float, float, float]  # of red, green and blue


class Stage(NamedTuple):
    """An operation that can happen to a view, its setting there, and the columns of its draws."""

    operation: Operation
    setting: Hashable
    first: int
    end: int

    def draws(self, draws_NP: Tensor) -> Tensor:
        """Its own of the draws of all operations."""
        return draws_NP[:, self.first : self.end]


class Stages(NamedTuple):
    """All that can happen to one view of a group; equal for views that one pass can make."""

    operations: tuple[Stage, ...]
    factor: Channels  # of the normalisation: value * factor + offset, which is (value - mean) / std to rounding
    offset: Channels


def stages_per_view(group: ViewGroup, *, size: int, mean: Channels, std: Channels) -> list[Stages]:
    """The stages of each view of the group, if it is `size` pixels wide."""
    (mean_red, mean_green, mean_blue), (red, green, blue) = mean, std
    factor, offset = (1 / red, 1 / green, 1 / blue), (-mean_red / red, -mean_green / green, -mean_blue / blue)
    return [Stages(tuple(_of_view(group, view, size)), factor, offset) for view in range(group.count)]


def _of_view(group: ViewGroup, view: int, size: int) -> Iterator[Stage]:
    first = 0
    for operation in group.operations:
        end = first + operation.num_draws(group)
        setting = operation.setting(group, view, size=size)
        if setting is not None:
            yield Stage(operation, setting, first, end)
        first = end
