"""Colour jitter, grayscale, blur, solarization, RandAugment and normalisation of a batch on its own device.

Each sample gets exactly what torchvision's functional float operations would give it, one at a time and in its own
order (Pillow's semantics, to rounding), from parameters that the host drew.
"""

from __future__ import annotations

import itertools
import warnings
from functools import cache

import torch
from torch import Tensor

from ssl_pipeline.augment.on_accelerator import augment_everywhere
from ssl_pipeline.augment.on_cpu import augment_selected
from ssl_pipeline.augment.parameters import Channels, Stages, stages_per_view
from ssl_pipeline.augment.views import ViewGroup

# V views of each of B images, C channels; N: the same images, one view at a time; P parameters


@torch.no_grad()
def apply_photometric(
    crops_VBCHW: Tensor,
    parameters_VBP: Tensor,
    group: ViewGroup,
    *,
    mean: Channels,
    std: Channels,
    compile: bool = True,
) -> Tensor:
    """Crops, 8 bits or floats in [0, 255] -> float32 views of the same shape, augmented and normalised, where they are.

    In this order: colour jitter, grayscale, blur, solarization, RandAugment, cutout, (value - mean) / std; values are
    in [0, 1] up to the last. Equals torchvision's functional operations (RandAugment: Pillow's) applied one sample at
    a time to within 1e-5. On an accelerator nothing waits for the device: every operation runs on all samples and
    those that it concerns take its result; on CUDA `compile` makes a few kernels of it, once for each kind of view,
    where torch.compile works. On a CPU only these samples are computed, as few at a time as its cache holds.
    """
    device = crops_VBCHW.device
    views_VBCHW = torch.empty(crops_VBCHW.shape, dtype=torch.float32, device=device)
    with torch.autocast(device.type, enabled=False):
        first = 0
        for stages, same in itertools.groupby(stages_per_view(group, mean=mean, std=std)):
            views = slice(first, first := first + len(list(same)))
            crops_NCHW, parameters_NP = crops_VBCHW[views].flatten(0, 1), parameters_VBP[views].flatten(0, 1)
            views_NCHW = views_VBCHW[views].flatten(0, 1)
            if device.type == "cpu":
                augment_selected(crops_NCHW, parameters_NP, stages, out=views_NCHW)
            else:
                augment = fused() if compile and device.type == "cuda" else augment_everywhere
                views_NCHW.copy_(augment(crops_NCHW, parameters_NP, stages))
    return views_VBCHW


class Fused:
    """`augment_everywhere` compiled, and as it is from the moment that torch.compile fails on this machine."""

    def __init__(self) -> None:
        # shapes stay the same from batch to batch; a second size is no reason for code that takes any
        self.augment = torch.compile(augment_everywhere, fullgraph=True, dynamic=False)

    def __call__(self, crops_NCHW: Tensor, parameters_NP: Tensor, stages: Stages) -> Tensor:
        try:
            return self.augment(crops_NCHW, parameters_NP, stages)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of no common type: no triton, no C compiler, a fault of the compiler's
            if self.augment is augment_everywhere:
                raise
            views_NCHW = augment_everywhere(crops_NCHW, parameters_NP, stages)  # which raises if the fault lies there
            self.augment = augment_everywhere
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            warnings.warn(
                "The colours of a batch run one operation at a time on this GPU, which is slower: torch.compile failed "
                f"({type(error).__name__}: {reason}). It needs triton and a C compiler such as gcc.",
                stacklevel=2,
            )
            return views_NCHW


@cache
def fused() -> Fused:
    """The one of this process, which keeps what it has compiled."""
    return Fused()
