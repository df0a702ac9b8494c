"""Colours of a batch on an accelerator: every stage on all samples, without a branch on a value."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.augment import colour
from ssl_pipeline.augment.parameters import NUM_PARAMETERS, Operation, Parameter, Stages
from ssl_pipeline.augment.rand_augment import apply_rand_augment

# N samples, C channels, P parameters


def augment_everywhere(crops_NCHW: Tensor, parameters_NP: Tensor, stages: Stages) -> Tensor:
    """Views (N,3,H,W) of one kind: each stage's result is taken where the sample is due."""
    result = crops_NCHW.to(torch.float32, memory_format=torch.contiguous_format) / 255
    if stages.operations:
        jittered = colour.per_sample(parameters_NP[:, Parameter.JITTER]) > 0
        result = torch.where(jittered, _jitter(result, parameters_NP, stages.operations), result)
    if stages.gray:
        result = torch.where(colour.per_sample(parameters_NP[:, Parameter.GRAY]) > 0, colour.gray(result), result)
    if stages.blur_kernel:
        sigma_N = parameters_NP[:, Parameter.BLUR_SIGMA].clamp(min=1e-3)  # so narrow that the kernel is 0 1 0
        result = colour.blur(result, sigma_N, stages.blur_kernel)
    if stages.solarize:
        solarized = colour.per_sample(parameters_NP[:, Parameter.SOLARIZE]) > 0
        result = torch.where(solarized, colour.solarize(result, stages.solarize_threshold), result)
    if stages.rand_augment or stages.cutout:
        result = apply_rand_augment(
            result,
            parameters_NP[:, NUM_PARAMETERS:],
            rounds=stages.rand_augment,
            cutout=stages.cutout,
            selected=False,
        )
    channels = zip(result.split(1, dim=1), stages.factor, stages.offset, strict=True)
    return torch.cat([channel * factor + offset for channel, factor, offset in channels], dim=1)


def _jitter(image_NCHW: Tensor, parameters_NP: Tensor, operations: tuple[Operation, ...]) -> Tensor:
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
        image_NCHW = _blend(image_NCHW, parameters_NP, mean_N111, turn=turn, due_N=due_N)
    if Operation.HUE in operations:
        shifted_NCHW = colour.shift_hue(
            image_NCHW, colour.per_sample(parameters_NP[:, Parameter.FACTOR + Operation.HUE])
        )
        image_NCHW = torch.where(colour.per_sample(hue_turn_N < end_N), shifted_NCHW, image_NCHW)
    for turn in (1, 2, 3):
        due_N = (turn > hue_turn_N) & (turn < end_N)
        image_NCHW = _blend(image_NCHW, parameters_NP, mean_N111, turn=turn, due_N=due_N)
    return image_NCHW


def _blend(image_NCHW: Tensor, parameters_NP: Tensor, mean_N111: Tensor, *, turn: int, due_N: Tensor) -> Tensor:
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
