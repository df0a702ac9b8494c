"""Networks that are not trained: a teacher that follows its student, and a snapshot that stays as it was taken.

Mean Teacher (Tarvainen & Valpola, 2017, https://arxiv.org/abs/1703.01780).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from ssl_pipeline.backbones import without_drop_path
from ssl_pipeline.config import ConfigError
from ssl_pipeline.files import sha256_of, sha256_of_tensors
from ssl_pipeline.schedule import Progress
from ssl_pipeline.sharded import local_parts

Network = TypeVar("Network", bound=nn.Module)


class Teacher(nn.Module, Generic[Network]):
    """An untrained copy of `student`, without drop path, whose parameters are a moving average of the student's.

    buffers: "own" leaves batch-norm statistics to the teacher's own forward passes (DINO, BYOL, MoCo), "copy" takes the
    student's at each update (FixMatch).
    """

    def __init__(self, student: Network, *, buffers: Literal["own", "copy"] = "own") -> None:
        super().__init__()
        self.network: Network = deepcopy(student).requires_grad_(False)
        self.buffer_source = buffers
        without_drop_path(self.network)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, for each parameter."""
        own, followed = local_parts(self.network.parameters()), local_parts(student.parameters())
        torch._foreach_lerp_(own, followed, 1.0 - momentum)
        if self.buffer_source == "copy":
            own_buffers, followed_buffers = list(self.network.buffers()), list(student.buffers())
            if own_buffers:
                torch._foreach_copy_(own_buffers, followed_buffers)


class Snapshot(nn.Module, Generic[Network]):
    """A frozen copy of a network, permanently in evaluation mode.

    One that was taken during training is saved with the run, and `refresh` takes it again (DINOv3's Gram teacher). One
    whose weights came from the file `source` stays out of state dicts, which hold the SHA-256 of that file instead: a
    run goes on with the same file or not at all (a tokenizer, a distilled teacher). Weights from elsewhere (a
    pretrained tag of timm's, a run's newest checkpoint) are treated alike, by the SHA-256 of their tensors.
    """

    source_sha256: Tensor

    def __init__(self, network: Network, *, source: Path | str | None = None) -> None:
        super().__init__()
        self.source = source
        frozen = deepcopy(network).requires_grad_(False).eval()
        without_drop_path(frozen)
        if source is None:
            self.saved = frozen
        else:
            self._unsaved = (frozen,)  # in a tuple, where torch does not look for modules
            weights = dict(sorted(frozen.state_dict().items()))  # as saved runs have them
            sha256 = sha256_of(source) if isinstance(source, Path) else sha256_of_tensors(weights)
            self.register_buffer("source_sha256", torch.tensor(list(bytes.fromhex(sha256))).byte())

    @property
    def network(self) -> Network:
        return self.saved if self.source is None else self._unsaved[0]

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    @torch.no_grad()
    def refresh(self, network: nn.Module) -> None:
        """Take over the parameters and buffers of `network`; for snapshots that came from no file."""
        assert self.source is None, "a snapshot from a file stays what the file says"
        own, theirs = self.saved.state_dict(), network.state_dict()
        torch._foreach_copy_(local_parts(own.values()), local_parts(theirs[name] for name in own))

    def train(self, mode: bool = True) -> Self:
        """Nothing: a snapshot is never trained."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.source is not None:
            self._unsaved[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        there = state_dict.get(f"{prefix}source_sha256")
        if self.source is not None and there is not None and not torch.equal(there.cpu(), self.source_sha256.cpu()):
            raise ConfigError(
                f"'{self.source}' is not the file that this run began with (its SHA-256 differs). Put that file back, "
                "or choose another output=DIR."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def averaging_momentum(progress: Progress, *, limit: float) -> float:
    """Mean Teacher's momentum after the step of `progress`: a true average at first, then `limit`.

    min(1 - 1 / (step + 2), limit): 1/2 after the first step.
    """
    return min(1 - 1 / (progress.step + 2), limit)
