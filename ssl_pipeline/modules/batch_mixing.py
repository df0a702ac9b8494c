"""mixup and CutMix over the global batch: an image's partner may be any image of any process.

The first process draws the numbers of all, so that two processes mix as one does. Images are gathered,
without gradient: what that costs a step is to send their pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_pipeline.distributed import copy_from_first_rank, gather, rank, world_size
from ssl_pipeline.mixing import cutmix, cutmix_boxes, mixup

# Axes: N rows of all parts and processes, C classes.
Mixed = tuple[list[Tensor], list[Tensor]]


def mixup_global_batch(
    images: Sequence[Tensor], targets: Sequence[Tensor], *, alpha: float, per_row: bool = True
) -> Mixed:
    """Images and targets of each part mixed with partners from any part; shares from Beta(alpha, alpha).

    Part by part images (rows, channels, H, W) and targets (rows, C). per_row: a share for each row, or one for all.
    """
    everything, labels = _global(images), _global(targets)
    draws = draw_shares(len(everything) if per_row else 1, alpha, everything.device)
    draws = draws if per_row else draws[0]
    partners = draw_partners(len(everything), everything.device)
    return _own(*mixup(everything, labels, draws=draws, partners=partners), images)


def cutmix_global_batch(images: Sequence[Tensor], targets: Sequence[Tensor], *, alpha: float) -> Mixed:
    """The same by CutMix: one box for the whole batch, its area from Beta(alpha, alpha)."""
    everything, labels = _global(images), _global(targets)
    draws = draw_shares(1, alpha, everything.device)
    centres = _of_first_rank(torch.rand(1, 2, device=everything.device))
    height, width = everything.shape[-2:]
    boxes = cutmix_boxes(draws, centres, height=height, width=width)[0]
    partners = draw_partners(len(everything), everything.device)
    return _own(*cutmix(everything, labels, boxes=boxes, partners=partners), images)


def draw_shares(count: int, alpha: float, device: torch.device) -> Tensor:
    """(count,) numbers from Beta(alpha, alpha), the same on all processes."""
    both = torch.full((count, 2), alpha)  # on the host: not every device can draw them
    drawn = torch.distributions.Dirichlet(both, validate_args=False).sample()[:, 0].contiguous()
    return _of_first_rank(drawn.to(device, non_blocking=True))


def draw_partners(count: int, device: torch.device) -> Tensor:
    """A permutation (count,), the same on all processes."""
    return _of_first_rank(torch.rand(count, device=device)).argsort(stable=True)


def draw_for_all(device: torch.device) -> Tensor:
    """(): one uniform number, the same on all processes."""
    return _of_first_rank(torch.rand((), device=device))


def draw_global(local: Sequence[int], device: torch.device) -> Tensor:
    """This process's rows, of shape `local`, of one draw of uniform numbers for the global batch."""
    rows, *rest = local
    return _of_first_rank(torch.rand(rows * world_size(), *rest, device=device)).chunk(world_size())[rank()]


def as_targets(labels: Tensor, num_classes: int, *, smoothing: float = 0.0, dtype: torch.dtype) -> Tensor:
    """(N, C) probabilities of labels, classes (N,) or soft (N, C): (1 - smoothing) * label + smoothing / C."""
    if labels.ndim == 1:
        labels = labels.new_zeros(len(labels), num_classes).scatter_(1, labels[:, None], 1)
    return labels.to(dtype) * (1 - smoothing) + smoothing / num_classes


def _of_first_rank(draws: Tensor) -> Tensor:
    copy_from_first_rank([draws])
    return draws


def _global(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([gather(part) for part in parts])


def _own(images: Tensor, targets: Tensor, parts: Sequence[Tensor]) -> Mixed:
    """This process's rows of each part."""
    sizes = [len(part) * world_size() for part in parts]
    own_images, own_targets = (
        [rows.chunk(world_size())[rank()] for rows in tensor.split(sizes)] for tensor in (images, targets)
    )
    return own_images, own_targets
