"""Colour jitter, grayscale, blur, solarization, RandAugment and normalisation of a batch on its own device.

Each sample gets exactly what torchvision's functional float operations would give it, one at a time and in its own
order (Pillow's semantics, to rounding), from parameters that the host drew.
"""

from __future__ import annotations

import itertools
from enum import IntEnum
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
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """8-bit crops -> float32 views of the same shape, augmented and normalised, on the crops' device.

    In this order: colour jitter, grayscale, blur, solarization, RandAugment, cutout, (value - mean) / std; values are
    in [0, 1] up to the last. Equals torchvision's functional operations (RandAugment: Pillow's) applied one sample at
    a time to within 1e-5. On an accelerator
    nothing waits for the device: every operation runs on all samples and those that it concerns take its result; on
    a CPU only these samples are computed.
    """
    device = crops_VBCHW.device
    augment = _augment_selected if device.type == "cpu" else _augment_everywhere
    views_VBCHW = torch.empty(crops_VBCHW.shape, dtype=torch.float32, device=device)
    for view, stages in enumerate(stages_per_view(group)):
        image_NCHW = views_VBCHW[view]
        image_NCHW.copy_(crops_VBCHW[view]).div_(255)
        augment(image_NCHW, parameters_VBP[view], stages)
        for channel, (channel_mean, channel_std) in enumerate(zip(mean, std, strict=True)):
            image_NCHW[:, channel].sub_(channel_mean).div_(channel_std)
    return views_VBCHW


def _augment_selected(image_NCHW: Tensor, parameters_NP: Tensor, stages: Stages) -> None:
    """Each stage on the samples that it concerns, in place."""
    if stages.operations:
        _jitter_by_order(image_NCHW, parameters_NP, stages.operations)
    if stages.gray:
        chosen = parameters_NP[:, Parameter.GRAY].nonzero()[:, 0]
        image_NCHW[chosen] = colour.gray(image_NCHW[chosen]).expand(-1, 3, -1, -1)
    if stages.blur_kernel:
        chosen = parameters_NP[:, Parameter.BLUR_SIGMA].nonzero()[:, 0]
        sigma_N = parameters_NP[chosen, Parameter.BLUR_SIGMA]
        image_NCHW[chosen] = colour.blur(image_NCHW[chosen], sigma_N, stages.blur_kernel)
    if stages.solarize:
        chosen = parameters_NP[:, Parameter.SOLARIZE].nonzero()[:, 0]
        image_NCHW[chosen] = colour.solarize(image_NCHW[chosen], stages.solarize_threshold)
    if stages.rand_augment or stages.cutout:
        image_NCHW.copy_(_augment_randomly(image_NCHW, parameters_NP, stages, selected=True))


def _jitter_by_order(image_NCHW: Tensor, parameters_NP: Tensor, operations: tuple[Operation, ...]) -> None:
    """Samples with the same order of operations together, so that each operation runs on a batch; in place."""
    samples_by_turns: dict[tuple[float, ...], list[int]] = {}
    for sample, (jitter, *turns) in enumerate(parameters_NP[:, : Parameter.FACTOR].tolist()):
        if jitter:
            samples_by_turns.setdefault(tuple(turns), []).append(sample)
    for turns, samples in samples_by_turns.items():
        chosen = torch.tensor(samples)
        part_NCHW = image_NCHW[chosen]
        for operation in sorted(operations, key=turns.__getitem__):
            factor_N111 = colour.per_sample(parameters_NP[chosen, Parameter.FACTOR + operation])
            part_NCHW = _jitter(part_NCHW, operation, factor_N111)
        image_NCHW[chosen] = part_NCHW


def _jitter(image_NCHW: Tensor, operation: Operation, factor_N111: Tensor) -> Tensor:
    if operation == Operation.BRIGHTNESS:
        return (image_NCHW * factor_N111).clamp_(0, 1)
    if operation == Operation.HUE:
        return colour.shift_hue(image_NCHW, factor_N111)
    target = colour.gray(image_NCHW)
    if operation == Operation.CONTRAST:
        target = target.mean(dim=(1, 2, 3), keepdim=True)
    return colour.blend(image_NCHW, target, factor_N111)


def _augment_everywhere(image_NCHW: Tensor, parameters_NP: Tensor, stages: Stages) -> None:
    """Each stage on all samples, kept where it applies; in place, without a branch on a value."""
    result = image_NCHW
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
    image_NCHW.copy_(_augment_randomly(result, parameters_NP, stages, selected=False))


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
        mean_N111 = colour.gray(before_NCHW).mean(dim=(1, 2, 3), keepdim=True)
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
