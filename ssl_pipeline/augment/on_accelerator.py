"""Colours of a batch on an accelerator: every operation on all samples, without a branch on a value."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from ssl_pipeline.augment.operations.base import Stages

# N samples, C channels, P draws


def augment_on_accelerator(crops_NCHW: Tensor, draws_NP: Tensor, stages: Stages) -> Tensor:
    """Views (N,3,H,W) of one kind: the result of each operation is taken where the sample is due."""
    result = crops_NCHW.to(torch.float32, memory_format=torch.contiguous_format) / 255
    for stage in stages.operations:
        result = stage.operation.on_accelerator(result, stage.draws(draws_NP), stage.setting)
    channels = zip(result.split(1, dim=1), stages.factor, stages.offset, strict=True)
    return torch.cat([channel * factor + offset for channel, factor, offset in channels], dim=1)


MOST_KINDS = 64  # of views, their sizes counted: each is compiled once; by itself torch gives up at the ninth


class Fused:
    """The same compiled, and as it is from the moment that torch.compile fails on this machine."""

    def __init__(self) -> None:
        # shapes stay the same from batch to batch; a second size does not call for code that takes any
        self.augment = torch.compile(augment_on_accelerator, fullgraph=True, dynamic=False)
        self.known: set[tuple[torch.Size, torch.dtype, Stages]] = set()

    def __call__(self, crops_NCHW: Tensor, draws_NP: Tensor, stages: Stages) -> Tensor:
        try:
            return self._augment(crops_NCHW, draws_NP, stages)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # they share no type: no triton, no C compiler, a compiler bug
            if self.augment is augment_on_accelerator:
                raise
            views_NCHW = augment_on_accelerator(crops_NCHW, draws_NP, stages)  # which raises if the fault lies there
            self.augment = augment_on_accelerator
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            warnings.warn(
                "The colours of a batch run one operation at a time on this GPU, which is slower: torch.compile failed "
                f"({type(error).__name__}: {reason}). It needs triton and a C compiler such as gcc.",
                stacklevel=2,
            )
            return views_NCHW

    def _augment(self, crops_NCHW: Tensor, draws_NP: Tensor, stages: Stages) -> Tensor:
        kind = crops_NCHW.shape, crops_NCHW.dtype, stages
        if kind in self.known:
            return self.augment(crops_NCHW, draws_NP, stages)
        with torch._dynamo.config.patch(recompile_limit=MOST_KINDS):
            views_NCHW = self.augment(crops_NCHW, draws_NP, stages)
        self.known.add(kind)
        return views_NCHW


@cache
def fused() -> Fused:
    """The one of this process, which keeps what it has compiled."""
    return Fused()
