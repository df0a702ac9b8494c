"""Colours of a batch on a CPU: each stage on the samples that it concerns, a few at a time, which its cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssl_pipeline.augment import colour
from ssl_pipeline.augment.parameters import NUM_PARAMETERS, Operation, Parameter, Stages
from ssl_pipeline.augment.rand_augment import apply_rand_augment

# N samples, C channels, P parameters

PIECE_VALUES = 3 * 224 * 224  # as many at a time fit into a second-level cache


def augment_selected(crops_NCHW: Tensor, parameters_NP: Tensor, stages: Stages, *, out: Tensor) -> None:
    """Views (N,3,H,W) of one kind into `out`."""
    for samples, turns in _pieces(parameters_NP, stages, crops_NCHW[0].numel()):
        alone = len(samples) == 1  # as a slice, which copies nothing
        chosen = slice(samples[0], samples[0] + 1) if alone else torch.tensor(samples)
        views_NCHW = out[chosen] if alone else out.new_empty(len(samples), *out.shape[1:])
        image_NCHW, own_NP = views_NCHW.copy_(crops_NCHW[chosen]).div_(255), parameters_NP[chosen]
        for operation in sorted(stages.operations, key=turns.__getitem__) if turns else ():
            _jitter(image_NCHW, operation, own_NP[:, Parameter.FACTOR + operation])
        image_NCHW = _finish(image_NCHW, own_NP, stages)
        for channel, (factor, offset) in enumerate(zip(stages.factor, stages.offset, strict=True)):
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


def _finish(image_NCHW: Tensor, parameters_NP: Tensor, stages: Stages) -> Tensor:
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
        image_NCHW = apply_rand_augment(
            image_NCHW.expand(-1, 3, -1, -1),
            parameters_NP[:, NUM_PARAMETERS:],
            rounds=stages.rand_augment,
            cutout=stages.cutout,
            selected=True,
        )
    return image_NCHW
