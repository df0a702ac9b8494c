"""Colour jitter, grayscale, blur, solarization, RandAugment and normalisation of a batch on its own device.

Each sample gets exactly what torchvision's functional float operations would give it, one at a time and in its own
order (Pillow's semantics, to rounding), from parameters that the host drew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pipeline.augment import colour
from ssl_pipeline.augment.rand_augment import CUTOUT_PARAMETERS, apply_rand_augment, cut_out, draw_rand_augment
from ssl_pipeline.augment.views import UNIFORMS_PER_VIEW, Uniform, ViewGroup

# V views of each of B images, C channels; N: the same images, one view at a time; P parameters


class Parameter(IntEnum):
    """The NUM_PARAMETERS columns of one view's parameters; TURN and FACTOR have one for each `Operation`.

    Those of RandAugment and cutout follow, where a group has them.
    """

    JITTER = 0  # 1 if the view is jittered
    TURN = 1  # when each operation is due: 0 first, 3 last
    FACTOR = 5  # of each operation; the hue's is a shift in turns of the colour circle
    GRAY = 9  # 1 if the view becomes gray
    BLUR_SIGMA = 10  # in pixels; 0 if the view is not blurred
    SOLARIZE = 11  # 1 if the view is solarized


NUM_PARAMETERS = 12


class Operation(IntEnum):
    """The operations of colour jitter, numbered as torchvision numbers them."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


Channels = tuple[float, float, float]  # of red, green and blue
PIECE_VALUES = 3 * 224 * 224  # a CPU works on about as many at a time, which its second-level cache holds
TURNS = np.array(list(itertools.permutations(range(len(Operation)))))


def draw_parameters(uniforms_VBU: NDArray[np.float64], group: ViewGroup) -> NDArray[np.float32]:
    """The parameters of each view from uniforms in [0, 1); runs on the host.

    (V,B,NUM_PARAMETERS), followed by those of `draw_rand_augment` if the group has RandAugment or cutout.
    """
    assert uniforms_VBU.shape[0] == group.count
    assert uniforms_VBU.shape[2] == group.num_uniforms()
    drawn_VBP = np.empty((*uniforms_VBU.shape[:2], NUM_PARAMETERS), np.float32)

    def between(uniform: Uniform, low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
        return low + (high - low) * uniforms_VBU[..., uniform]

    for column, uniform, probability in (
        (Parameter.JITTER, Uniform.JITTER, group.jitter_prob),
        (Parameter.GRAY, Uniform.GRAY, group.gray_prob),
        (Parameter.SOLARIZE, Uniform.SOLARIZE, group.solarize_prob),
    ):
        drawn_VBP[..., column] = uniforms_VBU[..., uniform] < np.array(group.per_view(probability))[:, None]
    for operation, uniform, strength in (
        (Operation.BRIGHTNESS, Uniform.BRIGHTNESS, group.brightness),
        (Operation.CONTRAST, Uniform.CONTRAST, group.contrast),
        (Operation.SATURATION, Uniform.SATURATION, group.saturation),
    ):
        strength_V1 = np.array(group.per_view(strength))[:, None]
        factor_VB = between(uniform, np.maximum(0, 1 - strength_V1), 1 + strength_V1)
        drawn_VBP[..., Parameter.FACTOR + operation] = factor_VB
    hue_V1 = np.array(group.per_view(group.hue))[:, None]
    drawn_VBP[..., Parameter.FACTOR + Operation.HUE] = between(Uniform.HUE, -hue_V1, hue_V1)

    order_VB = (uniforms_VBU[..., Uniform.ORDER] * len(TURNS)).astype(np.int64)
    drawn_VBP[..., Parameter.TURN : Parameter.TURN + len(Operation)] = TURNS[order_VB]
    blurred = uniforms_VBU[..., Uniform.BLUR] < np.array(group.per_view(group.blur_prob))[:, None]
    sigma = between(Uniform.BLUR_SIGMA, *(np.array(bound) for bound in group.blur_sigma))
    drawn_VBP[..., Parameter.BLUR_SIGMA] = np.where(blurred, sigma, 0)
    return np.concatenate((drawn_VBP, draw_rand_augment(uniforms_VBU[..., UNIFORMS_PER_VIEW:], group)), axis=-1)


class Stages(NamedTuple):
    """What can happen to one view of a group at all; the rest is skipped without looking at the parameters."""

    operations: tuple[Operation, ...]
    gray: bool
    blur_kernel: int  # 0: no blur
    solarize: bool
    solarize_threshold: float
    rand_augment: int  # rounds
    cutout: bool


class Normalise(NamedTuple):
    """value * factor + offset, which is (value - mean) / std to rounding."""

    factor: Channels
    offset: Channels

    @staticmethod
    def by(mean: Channels, std: Channels) -> Normalise:
        (mean_red, mean_green, mean_blue), (red, green, blue) = mean, std
        return Normalise((1 / red, 1 / green, 1 / blue), (-mean_red / red, -mean_green / green, -mean_blue / blue))


def stages_per_view(group: ViewGroup) -> list[Stages]:
    """The stages of each view of the group: those of some probability, jitter operations of some strength."""
    strengths = zip(*map(group.per_view, (group.brightness, group.contrast, group.saturation, group.hue)), strict=True)
    return [
        Stages(
            operations=tuple(op for op, strength in zip(Operation, view, strict=True) if strength and jitter),
            gray=gray > 0,
            blur_kernel=group.blur_kernel_size() if blur else 0,
            solarize=solarize > 0,
            solarize_threshold=group.solarize_threshold,
            rand_augment=group.rand_augment,
            cutout=group.cutout[1] > 0,
        )
        for view, jitter, gray, blur, solarize in zip(
            strengths,
            *map(group.per_view, (group.jitter_prob, group.gray_prob, group.blur_prob, group.solarize_prob)),
            strict=True,
        )
    ]


@torch.no_grad()
def apply_photometric(
    crops_VBCHW: Tensor,
    parameters_VBP: Tensor,
    group: ViewGroup,
    *,
    mean: Channels,
    std: Channels,
    compile: bool = False,
) -> Tensor:
    """Crops, 8 bits or floats in [0, 255] -> float32 views of the same shape, augmented and normalised, where they are.

    In this order: colour jitter, grayscale, blur, solarization, RandAugment, cutout, (value - mean) / std; values are
    in [0, 1] up to the last. Equals torchvision's functional operations (RandAugment: Pillow's) applied one sample at
    a time to within 1e-5. On an accelerator nothing waits for the device: every operation runs on all samples and
    those that it concerns take its result; `compile` makes a few kernels of it, once for each kind of view. On a CPU
    only these samples are computed, as few at a time as its cache holds.
    """
    device = crops_VBCHW.device
    selected = device.type == "cpu"
    normalise = Normalise.by(mean, std)
    views_VBCHW = torch.empty(crops_VBCHW.shape, dtype=torch.float32, device=device)
    with torch.autocast(device.type, enabled=False):
        first = 0
        for stages, same in itertools.groupby(stages_per_view(group)):
            views = slice(first, first := first + len(list(same)))
            crops_NCHW, parameters_NP = crops_VBCHW[views].flatten(0, 1), parameters_VBP[views].flatten(0, 1)
            if selected:
                _augment_selected(crops_NCHW, parameters_NP, stages, normalise, out=views_VBCHW[views].flatten(0, 1))
            else:
                augment = _compiled() if compile else _augment_everywhere
                views_VBCHW[views].flatten(0, 1).copy_(augment(crops_NCHW, parameters_NP, stages, normalise))
    return views_VBCHW


@cache
def _compiled() -> Callable[[Tensor, Tensor, Stages, Normalise], Tensor]:
    # shapes stay the same from batch to batch; a second size is no reason for code that takes any
    return torch.compile(_augment_everywhere, fullgraph=True, dynamic=False)


def _augment_selected(
    crops_NCHW: Tensor, parameters_NP: Tensor, stages: Stages, normalise: Normalise, *, out: Tensor
) -> None:
    """Each stage on the samples that it concerns, piece by piece."""
    for samples, turns in _pieces(parameters_NP, stages, crops_NCHW[0].numel()):
        alone = len(samples) == 1  # as a slice, which copies nothing
        chosen = slice(samples[0], samples[0] + 1) if alone else torch.tensor(samples)
        views_NCHW = out[chosen] if alone else out.new_empty(len(samples), *out.shape[1:])
        image_NCHW, own_NP = views_NCHW.copy_(crops_NCHW[chosen]).div_(255), parameters_NP[chosen]
        for operation in sorted(stages.operations, key=turns.__getitem__) if turns else ():
            _jitter(image_NCHW, operation, own_NP[:, Parameter.FACTOR + operation])
        image_NCHW = _finish_selected(image_NCHW, own_NP, stages)
        for channel, (factor, offset) in enumerate(zip(*normalise, strict=True)):
            source = image_NCHW[:, channel if image_NCHW.shape[1] > 1 else 0]
            torch.mul(source, factor, out=views_NCHW[:, channel]).add_(offset)
        if not alone:
            out[chosen] = views_NCHW


def _pieces(
    parameters_NP: Tensor, stages: Stages, values_per_sample: int
) -> Iterator[tuple[list[int], tuple[float, ...]]]:
    """Samples with the same turns of the jitter (none: not jittered), as many at a time as the cache holds."""
    samples_by_turns: dict[tuple[float, ...], list[int]] = {}
    if stages.operations:
        for sample, (jitter, *turns) in enumerate(parameters_NP[:, : Parameter.FACTOR].tolist()):
            samples_by_turns.setdefault(tuple(turns) if jitter else (), []).append(sample)
    else:
        samples_by_turns[()] = list(range(len(parameters_NP)))
    # RandAugment groups the samples by operation, of which there are many
    length = len(parameters_NP) if stages.rand_augment else max(1, PIECE_VALUES // values_per_sample)
    for turns, samples in samples_by_turns.items():
        for start in range(0, len(samples), length):
            yield samples[start : start + length], turns


def _jitter(image_NCHW: Tensor, operation: Operation, factor_N: Tensor) -> None:
    """One operation of colour jitter, in place."""
    factor = float(factor_N) if len(factor_N) == 1 else colour.per_sample(factor_N)  # a number is faster
    if operation == Operation.BRIGHTNESS:
        colour.brighten(image_NCHW, factor, out=image_NCHW)
    elif operation == Operation.HUE:
        colour.shift_hue(image_NCHW, factor, out=image_NCHW)
    else:
        target = colour.mean_gray if operation == Operation.CONTRAST else colour.gray
        colour.blend(image_NCHW, target(image_NCHW), factor, out=image_NCHW)


def _finish_selected(image_NCHW: Tensor, parameters_NP: Tensor, stages: Stages) -> Tensor:
    """What follows colour jitter, in place where it can be; with a single channel if all of the samples are gray."""

    def on(due_N: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if due_N.all():
            return change(image_NCHW, parameters_NP)
        if due_N.any():
            image_NCHW[due_N] = change(image_NCHW[due_N], parameters_NP[due_N])
        return image_NCHW

    def blur(part_NCHW: Tensor, part_NP: Tensor) -> Tensor:
        sigma_N = part_NP[:, Parameter.BLUR_SIGMA]
        return colour.blur_by_matrices(part_NCHW, sigma_N, stages.blur_kernel, out=part_NCHW)

    if stages.gray:
        image_NCHW = on(parameters_NP[:, Parameter.GRAY] > 0, lambda part_NCHW, _: colour.gray(part_NCHW))
    if stages.blur_kernel:
        image_NCHW = on(parameters_NP[:, Parameter.BLUR_SIGMA] > 0, blur)
    if stages.solarize:
        image_NCHW = on(
            parameters_NP[:, Parameter.SOLARIZE] > 0,
            lambda part_NCHW, _: colour.solarize(part_NCHW, stages.solarize_threshold, out=part_NCHW),
        )
    if stages.rand_augment or stages.cutout:
        image_NCHW = _augment_randomly(image_NCHW.expand(-1, 3, -1, -1), parameters_NP, stages, selected=True)
    return image_NCHW


def _augment_everywhere(crops_NCHW: Tensor, parameters_NP: Tensor, stages: Stages, normalise: Normalise) -> Tensor:
    """Each stage on all samples, kept where it applies, without a branch on a value."""
    result = crops_NCHW.to(torch.float32) / 255
    if stages.operations:
        jittered = colour.per_sample(parameters_NP[:, Parameter.JITTER]) > 0
        result = torch.where(jittered, _jitter_everywhere(result, parameters_NP, stages.operations), result)
    if stages.gray:
        result = torch.where(colour.per_sample(parameters_NP[:, Parameter.GRAY]) > 0, colour.gray(result), result)
    if stages.blur_kernel:
        sigma_N = parameters_NP[:, Parameter.BLUR_SIGMA].clamp(min=1e-3)  # so narrow that the kernel is 0 1 0
        result = colour.blur(result, sigma_N, stages.blur_kernel)
    if stages.solarize:
        solarized = colour.per_sample(parameters_NP[:, Parameter.SOLARIZE]) > 0
        result = torch.where(solarized, colour.solarize(result, stages.solarize_threshold), result)
    result = _augment_randomly(result, parameters_NP, stages, selected=False)
    channels = zip(result.split(1, dim=1), *normalise, strict=True)
    return torch.cat([channel * factor + offset for channel, factor, offset in channels], dim=1)


def _augment_randomly(image_NCHW: Tensor, parameters_NP: Tensor, stages: Stages, *, selected: bool) -> Tensor:
    if stages.rand_augment:
        own_NP = parameters_NP[:, NUM_PARAMETERS:]
        image_NCHW = apply_rand_augment(image_NCHW, own_NP, rounds=stages.rand_augment, selected=selected)
    return cut_out(image_NCHW, parameters_NP[:, -CUTOUT_PARAMETERS:]) if stages.cutout else image_NCHW


def _jitter_everywhere(image_NCHW: Tensor, parameters_NP: Tensor, operations: tuple[Operation, ...]) -> Tensor:
    """The operations in each sample's order, in two sweeps of pointwise work.

    Only contrast needs more than the pixel itself, the image's mean gray at its turn: the first sweep runs what comes
    before contrast, to find that mean; the second runs everything.
    """
    mean_N111 = torch.zeros_like(image_NCHW[:, :1, :1, :1])
    if Operation.CONTRAST in operations:
        contrast_turn_N = parameters_NP[:, Parameter.TURN + Operation.CONTRAST]
        before_NCHW = _sweep(image_NCHW, parameters_NP, mean_N111, end_N=contrast_turn_N, operations=operations)
        mean_N111 = colour.mean_gray(before_NCHW)
    end_N = torch.full_like(parameters_NP[:, Parameter.TURN], len(Operation))
    return _sweep(image_NCHW, parameters_NP, mean_N111, end_N=end_N, operations=operations)


def _sweep(
    image_NCHW: Tensor,
    parameters_NP: Tensor,
    mean_N111: Tensor,
    *,
    end_N: Tensor,
    operations: tuple[Operation, ...],
) -> Tensor:
    """The operations whose turn comes before `end_N`; hue, the dear one, once, the blends on both sides of it."""
    hue_turn_N = parameters_NP[:, Parameter.TURN + Operation.HUE]
    for turn in (0, 1, 2):
        due_N = (turn < hue_turn_N) & (turn < end_N)
        image_NCHW = _blend_everywhere(image_NCHW, parameters_NP, mean_N111, turn=turn, due_N=due_N)
    if Operation.HUE in operations:
        shifted_NCHW = colour.shift_hue(
            image_NCHW, colour.per_sample(parameters_NP[:, Parameter.FACTOR + Operation.HUE])
        )
        image_NCHW = torch.where(colour.per_sample(hue_turn_N < end_N), shifted_NCHW, image_NCHW)
    for turn in (1, 2, 3):
        due_N = (turn > hue_turn_N) & (turn < end_N)
        image_NCHW = _blend_everywhere(image_NCHW, parameters_NP, mean_N111, turn=turn, due_N=due_N)
    return image_NCHW


def _blend_everywhere(
    image_NCHW: Tensor, parameters_NP: Tensor, mean_N111: Tensor, *, turn: int, due_N: Tensor
) -> Tensor:
    """Brightness, contrast or saturation, whichever has this turn; samples that are not due stay as they are."""
    factor_N111 = torch.ones_like(mean_N111)
    target_N1HW = torch.zeros_like(mean_N111)
    for operation, operation_target in (
        (Operation.BRIGHTNESS, target_N1HW),
        (Operation.CONTRAST, mean_N111),
        (Operation.SATURATION, colour.gray(image_NCHW)),
    ):
        now_N111 = colour.per_sample(due_N & (parameters_NP[:, Parameter.TURN + operation] == turn))
        factor_N111 = torch.where(
            now_N111, colour.per_sample(parameters_NP[:, Parameter.FACTOR + operation]), factor_N111
        )
        target_N1HW = torch.where(now_N111, operation_target, target_N1HW)
    return colour.blend(image_NCHW, target_N1HW, factor_N111)
