"""The teacher: a copy of the student that follows it slowly (Mean Teacher, Tarvainen & Valpola, 2017,
https://arxiv.org/abs/1703.01780)."""

from __future__ import annotations

from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import without_drop_path


class Teacher(nn.Module):
    """An untrained copy of `student`, without drop path, whose parameters are a moving average of the student's.

    buffers: "own" leaves batch-norm statistics to the teacher's own forward passes (DINO, BYOL, MoCo), "copy" takes the
    student's at each update (FixMatch).
    """

    def __init__(self, student: nn.Module, *, buffers: Literal["own", "copy"] = "own") -> None:
        super().__init__()
        self.network = deepcopy(student).requires_grad_(False)
        self.buffer_source = buffers
        without_drop_path(self.network)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, for each parameter."""
        own: list[Tensor] = list(self.network.parameters())
        followed: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(own, followed, 1.0 - momentum)
        if self.buffer_source == "copy":
            own_buffers, followed_buffers = list(self.network.buffers()), list(student.buffers())
            if own_buffers:
                torch._foreach_copy_(own_buffers, followed_buffers)
