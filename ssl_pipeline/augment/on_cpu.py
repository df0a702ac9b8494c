"""Colours of a batch on a CPU: each operation on the samples it concerns, as few at a time as its cache holds."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor

from ssl_pipeline.augment.operations.base import Stages

# N samples, C channels, P draws

PIECE_VALUES = 3 * 224 * 224  # as many at a time fit into a second-level cache


def augment_on_cpu(crops_NCHW: Tensor, draws_NP: Tensor, stages: Stages, *, out: Tensor) -> None:
    """Views (N,3,H,W) of one kind into `out`."""
    for samples in _pieces(draws_NP, stages, crops_NCHW[0].numel()):
        alone = len(samples) == 1  # as a slice, which copies nothing
        chosen = slice(samples[0], samples[0] + 1) if alone else torch.tensor(samples)
        views_NCHW = out[chosen] if alone else out.new_empty(len(samples), *out.shape[1:])
        image_NCHW, own_NP = views_NCHW.copy_(crops_NCHW[chosen]).div_(255), draws_NP[chosen]
        for stage in stages.operations:
            image_NCHW = stage.operation.on_cpu(image_NCHW, stage.draws(own_NP), stage.setting)
        for channel, (factor, offset) in enumerate(zip(stages.factor, stages.offset, strict=True)):
            source = image_NCHW[:, channel if image_NCHW.shape[1] > 1 else 0]
            torch.mul(source, factor, out=views_NCHW[:, channel]).add_(offset)
        if not alone:
            out[chosen] = views_NCHW


def _pieces(draws_NP: Tensor, stages: Stages, values_per_sample: int) -> Iterator[list[int]]:
    """Samples that all operations take together, as many at a time as the cache holds."""
    keys = [stage.operation.alike(stage.draws(draws_NP)) for stage in stages.operations]
    key_of_samples = zip(*(each for each in keys if each is not None), strict=True)
    samples_of: dict[tuple[Hashable, ...], list[int]] = {}
    for sample, key in enumerate(key_of_samples):
        samples_of.setdefault(key, []).append(sample)
    whole = any(stage.operation.whole_batches for stage in stages.operations)
    length = len(draws_NP) if whole else max(1, PIECE_VALUES // values_per_sample)
    for samples in samples_of.values() or [list(range(len(draws_NP)))]:
        for start in range(0, len(samples), length):
            yield samples[start : start + length]
