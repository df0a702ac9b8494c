"""A first look at the images of a run, before and after they are packed, and how large they need to be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ssl_pipeline.config import Tree
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.packing.candidates import find_candidates, parts_of_a_set
from ssl_pipeline.packing.packed_once import look_at
from ssl_pipeline.packing.sources import Source

SMALLEST_PACKED = 256  # pixels of the shorter side
ROOM = 2  # packed images are at least this many times the largest view, and worth it from this many times that


@dataclass(frozen=True)
class Look:
    """How many images there are, the median of their shorter sides in pixels, and the number of their classes: 0 unless
    each has a label.
    """

    count: int
    side: int
    classes: int


def look_at_shards(index: ShardIndex) -> Look:
    """A look at images that are packed."""
    classes = len(np.unique(index.labels())) if index.label_problem() is None else 0
    return Look(len(index), int(np.median(index.sizes().min(axis=1))) if len(index) else 0, classes)


def look_at_files(files: Source) -> Look:
    """A look at images before they are packed: by the names of all, and the sizes of some."""
    count, side = look_at(files)
    found = find_candidates(files)
    labels = {image.label for image in found.images}
    return Look(count, side, 0 if None in labels or parts_of_a_set(found) else len(labels))


def reduced_side(side: int, view: int) -> int | None:
    """Pixels of the shorter side to which large photographs are reduced as they are packed; None where that gains
    little. side: their median; view: pixels of the largest view.
    """
    short_side = max(ROOM * view, SMALLEST_PACKED)
    return short_side if side > ROOM * short_side else None


def largest_view(recipe: Tree, given: Mapping[str, str]) -> int:
    """Pixels of the largest view that a recipe asks for, with what is given over it."""
    augment = recipe.get("augment")
    groups = augment.items() if isinstance(augment, dict) else ()
    asked = {name: str(group.get("size")) for name, group in groups if isinstance(group, dict)}
    sizes = [given.get(f"augment.{name}.size", size) for name, size in asked.items()]
    return max((int(number) for size in sizes for number in re.findall(r"\d+", size)), default=0)
