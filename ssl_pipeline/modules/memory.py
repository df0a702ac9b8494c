"""What a method remembers across steps: features, a centre, distributions over classes.

Everything is in registered buffers and so survives a restart. Reading changes nothing; `update` and `enqueue` are
called in `after_step`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pipeline.config import ConfigError
from ssl_pipeline.distributed import mean_over_ranks

# Axes: B rows of a step, of all processes; K prototypes, C classes, W batches of a window.


class FeatureQueue(nn.Module):
    """The `size` newest features, first in first out; random directions until they are replaced.

    MoCo's memory (He et al., 2019, https://arxiv.org/abs/1911.05722). features: (size, dim). position: the next row to
    be replaced. num_replaced: how many places have been replaced since the queue was made.
    """

    features: Tensor
    position: Tensor
    num_replaced: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))
        self.register_buffer("num_replaced", torch.zeros((), dtype=torch.long))
        self._num_replaced = 0  # the same on the host, so that reading `full` does not wait for the device
        self.register_load_state_dict_post_hook(_read_num_replaced)

    @property
    def full(self) -> bool:
        """Whether every place has been replaced since the queue was made."""
        return self._num_replaced >= len(self.features)

    @torch.no_grad()
    def enqueue(self, features: Tensor) -> None:
        """Replace the oldest rows by `features` (B, dim), gathered from all processes in rank order."""
        size, num_new = len(self.features), len(features)
        if num_new == 0 or size % num_new:
            raise ValueError(
                f"the queue's size must be a multiple of the global batch. Got {size} places and {num_new} features."
            )
        rows = self.position + torch.arange(num_new, device=features.device)
        self.features.index_copy_(0, rows % size, features.to(self.features.dtype))
        self.position.add_(num_new).remainder_(size)
        self._num_replaced = min(self._num_replaced + num_new, size)
        self.num_replaced.fill_(self._num_replaced)


def check_queue_size(size: int, num_new: int, *, multiple_of: str) -> None:
    """Raises ConfigError unless the `num_new` features of a step, `multiple_of` in words, fill a queue evenly."""
    if size % num_new:
        nearest = max(1, round(size / num_new)) * num_new
        raise ConfigError(f"method.queue_size must be a multiple of {multiple_of}. Got {size}; try {nearest}.")


def _read_num_replaced(queue: nn.Module, _: object) -> None:
    assert isinstance(queue, FeatureQueue)
    queue._num_replaced = int(queue.num_replaced)


class Centre(nn.Module):
    """A moving mean of a teacher's logits (DINO, Caron et al., 2021, https://arxiv.org/abs/2104.14294).

    value: (K,), zeros at first.
    """

    value: Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(num_prototypes))

    @torch.no_grad()
    def update(self, total_K: Tensor, *, num_rows: int | Tensor, momentum: float) -> None:
        """value = momentum * value + (1 - momentum) * (total over all processes / rows over all processes).

        `total_K` is the sum of the logits over this step's `num_rows` rows of this process, which may differ between
        processes. Without a row anywhere the value stays.
        """
        if isinstance(num_rows, int):
            num_rows = self.value.new_full((), num_rows)
        both = mean_over_ranks(torch.cat([total_K.to(self.value.dtype), num_rows.to(self.value.dtype).view(1)]))
        total_K, rows = both[:-1], both[-1]
        share = (1 - momentum) * (rows > 0).to(self.value.dtype)
        self.value.lerp_(total_K / torch.where(rows > 0, rows, 1), share)


class MovingDistribution(nn.Module):
    """A moving mean of distributions over classes.

    value: (C,), uniform at first. start: "uniform": that counts in the mean; "batch": the first update
    replaces it.
    """

    value: Tensor
    started: Tensor

    def __init__(self, num_classes: int, *, momentum: float, start: Literal["uniform", "batch"] = "uniform") -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("started", torch.tensor(start == "uniform"))

    @torch.no_grad()
    def after(self, mean_C: Tensor) -> Tensor:
        """What `update` would leave: momentum * value + (1 - momentum) * mean; `mean_C` is that of the global batch."""
        mean_C = mean_C.to(self.value.dtype)
        return torch.where(self.started, torch.lerp(mean_C, self.value, self.momentum), mean_C)

    @torch.no_grad()
    def update(self, mean_C: Tensor) -> None:
        self.value.copy_(self.after(mean_C))
        self.started.fill_(True)


class RecentDistribution(nn.Module):
    """The plain mean of the distributions over classes of the last `window` batches; uniform ones fill it at first."""

    recent: Tensor
    position: Tensor

    def __init__(self, num_classes: int, *, window: int) -> None:
        super().__init__()
        self.register_buffer("recent", torch.full((window, num_classes), 1 / num_classes))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @property
    def value(self) -> Tensor:
        """(C,)."""
        return self.recent.mean(dim=0)

    @torch.no_grad()
    def after(self, mean_C: Tensor) -> Tensor:
        """The value that `update` would leave; `mean_C` is the mean distribution of the global batch."""
        return self._with(mean_C).mean(dim=0)

    @torch.no_grad()
    def update(self, mean_C: Tensor) -> None:
        self.recent.copy_(self._with(mean_C))
        self.position.add_(1).remainder_(len(self.recent))

    def _with(self, mean_C: Tensor) -> Tensor:
        """(W, C) with the oldest distribution replaced."""
        return self.recent.index_copy(0, self.position.view(1), mean_C.to(self.recent.dtype)[None])
