"""Every random number of a view: its crop, its flip, its mask and what happens to its colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ssl_pipeline.augment.masks import draw_counts, draw_masks, grid_of
from ssl_pipeline.augment.operations import Operation
from ssl_pipeline.augment.views import ViewGroup, check_crops_of
from ssl_pipeline.batch import MaskRule
from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import sha256_of_bytes
from ssl_pipeline.randomness import MASK, VIEW_SIZE, generate_uniforms, hash64, uniforms

# V views of each of B images, U uniforms in [0, 1), N tries, P draws of the operations, L patches

Integers = NDArray[np.int64]
CROP_TRIES = 10


class CropUniform(IntEnum):
    """Where each of the first uniforms of a view goes; those of the operations follow."""

    AREA = 0  # one for each of the CROP_TRIES tries
    ASPECT = 10  # likewise
    TOP = 20  # the position is drawn once: it plays no part in whether a try fits
    LEFT = 21
    FLIP = 22


NUM_CROP_UNIFORMS = 23


def crop_boxes(
    uniforms_VBU: NDArray[np.float64], heights_B: Integers, widths_B: Integers, group: ViewGroup
) -> tuple[Integers, NDArray[np.bool_]]:
    """Where each view is cut out, (V,B,4) as (top, left, height, width), and whether it is flipped, (V,B).

    `random_resized` has the distribution of torchvision's RandomResizedCrop: area uniform in `scale`, aspect
    log-uniform in `aspect`, the first of ten tries that fits into the image at a uniform position; if none fits, the
    largest central crop of an allowed aspect. `pad` boxes are as large as the image and shifted by up to `padding`
    of its size, so they may reach out of it.
    """
    assert uniforms_VBU.shape == (group.count, len(heights_B), num_uniforms(group))
    tops_VB, lefts_VB = uniforms_VBU[..., CropUniform.TOP], uniforms_VBU[..., CropUniform.LEFT]
    if group.crop == "pad":
        shape = uniforms_VBU.shape[:2]
        crop_heights_VB, crop_widths_VB = np.broadcast_to(heights_B, shape), np.broadcast_to(widths_B, shape)
        reach_down_B, reach_right_B = (np.floor(size * group.padding) for size in (heights_B, widths_B))
        tops_VB = np.floor(tops_VB * (2 * reach_down_B + 1)) - reach_down_B
        lefts_VB = np.floor(lefts_VB * (2 * reach_right_B + 1)) - reach_right_B
    else:
        crop_heights_VB, crop_widths_VB, fits_VB = _crop_sizes(uniforms_VBU, heights_B, widths_B, group)
        below_VB, beside_VB = heights_B - crop_heights_VB, widths_B - crop_widths_VB
        tops_VB = np.where(fits_VB, np.floor(tops_VB * (below_VB + 1)), below_VB // 2)
        lefts_VB = np.where(fits_VB, np.floor(lefts_VB * (beside_VB + 1)), beside_VB // 2)
    boxes_VB4 = np.stack((tops_VB, lefts_VB, crop_heights_VB, crop_widths_VB), axis=-1).astype(np.int64)
    flip_prob_V = np.asarray(group.per_view(group.flip_prob))
    return boxes_VB4, uniforms_VBU[..., CropUniform.FLIP] < flip_prob_V[:, None]


def _crop_sizes(
    uniforms_VBU: NDArray[np.float64], heights_B: Integers, widths_B: Integers, group: ViewGroup
) -> tuple[Integers, Integers, NDArray[np.bool_]]:
    """Heights and widths of random_resized crops, and whether they come from a try (else from the fallback)."""
    smallest, largest = group.scale
    narrowest, widest = group.aspect
    u_area_VBN = uniforms_VBU[..., CropUniform.AREA : CropUniform.AREA + CROP_TRIES]
    u_aspect_VBN = uniforms_VBU[..., CropUniform.ASPECT : CropUniform.ASPECT + CROP_TRIES]
    area_VBN = (smallest + (largest - smallest) * u_area_VBN) * (heights_B * widths_B)[:, None]
    aspect_VBN = np.exp(np.log(narrowest) + (np.log(widest) - np.log(narrowest)) * u_aspect_VBN)
    tries_VBN2 = np.rint(np.sqrt(np.stack((area_VBN / aspect_VBN, area_VBN * aspect_VBN), axis=-1))).astype(np.int64)
    image_B2 = np.stack((heights_B, widths_B), axis=-1)
    fits_VBN = ((tries_VBN2 > 0) & (tries_VBN2 <= image_B2[:, None])).all(axis=-1)
    first_VB11 = fits_VBN.argmax(axis=-1)[..., None, None]
    first_VB2 = np.take_along_axis(tries_VBN2, first_VB11, axis=2)[:, :, 0]
    # the fallback: whichever side is too long for the allowed aspects is cut
    central_B2 = np.stack(
        (np.minimum(heights_B, np.rint(widths_B / narrowest)), np.minimum(widths_B, np.rint(heights_B * widest))),
        axis=-1,
    )
    fits_VB = fits_VBN.any(axis=-1)
    sizes_VB2 = np.where(fits_VB[..., None], first_VB2, np.maximum(central_B2, 1)).astype(np.int64)
    return sizes_VB2[..., 0], sizes_VB2[..., 1], fits_VB


def draw_operations(uniforms_VBU: NDArray[np.float64], group: ViewGroup, *, size: int) -> NDArray[np.float32]:
    """(V,B,P): what each operation makes of its own uniforms for views of `size` pixels, one after the other."""
    drawn = [
        operation.draw(uniforms_VBU[..., own], group, size=size)
        for operation, own in _slices(group).items()
        if own.stop > own.start
    ]
    return np.concatenate(drawn, axis=-1)


def num_uniforms(group: ViewGroup) -> int:
    """How many uniforms one view of one image takes: U."""
    return NUM_CROP_UNIFORMS + sum(operation.num_uniforms(group) for operation in group.operations)


def num_draws(group: ViewGroup) -> int:
    """How many numbers the operations make of them: P."""
    return sum(operation.num_draws(group) for operation in group.operations)


def _slices(group: ViewGroup) -> dict[Operation, slice]:
    """The slice of each operation's uniforms among those of a view."""
    slices, first = {}, NUM_CROP_UNIFORMS
    for operation in group.operations:
        slices[operation] = slice(first, first := first + operation.num_uniforms(group))
    return slices


def group_uniforms(
    name: str, group: ViewGroup, *, seed: int, epochs_B: Integers, samples_B: Integers
) -> NDArray[np.float64]:
    """The uniforms (V,B,U) of a group of views of each sample, which depend on nothing but the arguments."""
    return uniforms(seed, epochs_B, samples_B, views=group.count, count=num_uniforms(group), stream=_stream_of(name))


def _stream_of(name: str) -> int:
    """The name of a group as a number of 64 bits: adding a group changes no other."""
    return int(sha256_of_bytes(name.encode())[:16], 16)


@dataclass(frozen=True)
class Drawn:
    """What was drawn on the host for one group of views.

    Boxes (V,B,4), flips (V,B), the operations' draws (V,B,P) float32, and masks (V,B,L) where the group has a rule.
    """

    boxes: Integers
    flips: NDArray[np.bool_]
    draws: NDArray[np.float32]
    masks: NDArray[np.bool_] | None


@dataclass(frozen=True)
class ViewSampler:
    """Everything random about the views of a stream, wherever crops are cut out and whatever process they are for.

    What a view gets follows from the seed, the epoch, the sample and the group; its size from the seed and the
    optimizer step; a `stratified` mask also from the step and from the image's place among those of the step. Step and
    place follow from the position in the stream.
    masks: rules by the name of a group. global_batch: images per optimizer step, over all processes and micro-batches.
    offset: where in the stream a step begins, as do those `global_batch` positions before and after it.
    size_seed: the seed of the sizes, which streams that feed one step have in common.
    """

    groups: Mapping[str, ViewGroup]
    masks: Mapping[str, MaskRule]
    seed: int
    global_batch: int
    offset: int = 0
    size_seed: int = 0

    def __post_init__(self) -> None:
        check_crops_of(self.groups)
        for name, size in ((name, size) for name, group in self.groups.items() for size in group.sizes):
            if name in self.masks:
                try:
                    grid_of(self.masks[name], size)
                except ValueError as error:
                    raise ConfigError(f"augment.{name}: {error}") from None

    def sizes(self, positions: Sequence[int] | None = None) -> dict[str, int]:
        """The side in pixels of the views of each group in the step of these positions; without them, the largest."""
        if positions is None or all(len(group.sizes) == 1 for group in self.groups.values()):
            return {name: max(group.sizes) for name, group in self.groups.items()}
        step, _ = self._step_and_place(positions)
        (uniform,) = generate_uniforms(hash64(self.size_seed, VIEW_SIZE, step), 1)
        return {name: _size_at(uniform, group) for name, group in self.groups.items()}

    def num_patches(self, name: str, size: int) -> int:
        """How many patches a view of a group with a mask has at this size: L."""
        rows, columns = grid_of(self.masks[name], size)
        return rows * columns

    def draw(
        self,
        positions: Sequence[int],
        *,
        epochs_B: Integers,
        samples_B: Integers,
        heights_B: Integers,
        widths_B: Integers,
    ) -> dict[str, Drawn]:
        """All groups of views of the samples at some positions of one step; epochs, samples and sizes are theirs."""
        where, sizes, drawn = {"epochs_B": epochs_B, "samples_B": samples_B}, self.sizes(positions), {}
        uniforms = {name: group_uniforms(name, group, seed=self.seed, **where) for name, group in self.groups.items()}
        for name, group in self.groups.items():
            source = group.crops_of or name
            boxes_VB4, flips_VB = crop_boxes(uniforms[source], heights_B, widths_B, self.groups[source])
            own_VBU = _with_those_of(self.groups[source], uniforms[source], group, uniforms[name])
            draws_VBP = draw_operations(own_VBU, group, size=sizes[name])
            masks_VBL = self._masks(name, sizes[name], positions, **where) if name in self.masks else None
            drawn[name] = Drawn(boxes_VB4, flips_VB, draws_VBP, masks_VBL)
        return drawn

    def _masks(
        self, name: str, size: int, positions: Sequence[int], *, epochs_B: Integers, samples_B: Integers
    ) -> NDArray[np.bool_]:
        rule, num_views, stream = self.masks[name], self.groups[name].count, _stream_of(name)
        states_VB = hash64(self.seed, MASK, stream, epochs_B, samples_B, np.arange(num_views)[:, None])
        counts_VB = None
        if rule.stratified:
            step, place = self._step_and_place(positions)
            counts = draw_counts(rule, size, num_views * self.global_batch, hash64(self.seed, MASK, stream, step))
            counts_VB = counts.reshape(num_views, -1)[:, place : place + len(positions)]
        return draw_masks(rule, size, states_VB, counts_VB=counts_VB)

    def _step_and_place(self, positions: Sequence[int]) -> tuple[int, int]:
        """The optimizer step of these positions, and the place of the first among its images."""
        return divmod(positions[0] - self.offset, self.global_batch)


def _size_at(uniform: float, group: ViewGroup) -> int:
    """The size that a number in [0, 1) stands for."""
    shares = np.cumsum(group.size_weights or np.ones(len(group.sizes)))
    return group.sizes[int(np.searchsorted(shares[:-1], uniform * shares[-1], side="right"))]


def _with_those_of(
    source: ViewGroup, theirs_VBU: NDArray[np.float64], group: ViewGroup, own_VBU: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The uniforms of a group, but those of the source for operations that take as many there."""
    if group is source:
        return own_VBU
    of_source = _slices(source)
    for operation, own in _slices(group).items():
        theirs = of_source[operation]
        if own.stop - own.start == theirs.stop - theirs.start:
            own_VBU[..., own] = theirs_VBU[..., theirs]
    return own_VBU
