"""What `make gpu-check` is told, and what a check leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from ssl_pipeline.config import Config
from ssl_pipeline.files import JSON

Name = Literal[
    "cuda_tests",
    "pinned_ring",
    "compiled_colours",
    "no_host_sync",
    "kill_and_resume",
    "precision",
    "compile",
    "fsdp",
    "cifar10",
    "dino_vits16",
    "dinov2_vits14",
    "dinov2_vitl16",
]
State = Literal["passed", "failed", "skipped", "too long", "no time"]


class GpuCheckConfig(Config):
    """See whether all works on this machine's GPU, how fast it is, and which defaults should change.

    The checks run one after the other, each within its time limit. Without a GPU they run in tiny sizes, which says
    that the checks themselves work.
    """

    only: tuple[Name, ...] = ()
    """Checks to run, for instance only=compile,cifar10; all of them by default."""
    minutes: Annotated[float, Field(gt=0, le=1e4)] = 15.0
    """For everything: what does not begin in that time is left out."""
    patience: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Times the time limit of each check, for a slow machine."""
    output: Path = Path("runs/gpu_check")
    """Directory for gpu_check.json and the runs of the checks."""
    cifar10: Path = Path("data/cifar10")
    """Directory with the shards train and test of CIFAR-10, as docs/images.md makes them."""
    imagenet: Path | None = None
    """Folder or zip of photographs as JPEG; by default parts of the two that come with scikit-learn."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 8
    """Reading processes of the measured runs; a tiny one has one."""
    size: Literal["auto", "tiny", "large"] = "auto"
    """auto: large on a GPU, else tiny."""

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny" or (self.size == "auto" and not torch.cuda.is_available())


@dataclass(frozen=True)
class Found:
    """What a check has found: one line for the table, and figures for the advice and for gpu_check.json."""

    state: State
    said: str
    figures: dict[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class StepFigures:
    """What one training step takes. images_per_second: at this `batch`; peak_gb and mfu: None where that is unknown;
    loss and last_loss: before and after all steps."""

    recipe: str
    batch: int
    precision: str
    compiled: bool
    sharded: bool
    seconds: float
    images_per_second: float
    seconds_of_first_steps: float
    peak_gb: float | None
    loss: float
    last_loss: float
    gflops_per_image: float
    mfu: float | None


@dataclass(frozen=True)
class Place:
    """Where a check works, and until when."""

    config: GpuCheckConfig
    folder: Path
    ends: float

    @property
    def seconds_left(self) -> float:
        return max(self.ends - time.monotonic(), 0.0)


@dataclass(frozen=True)
class Check:
    """One line of the table. limit: seconds; on a machine without a GPU a tiny check has the same."""

    name: Name
    what: str
    limit: float
    run: Callable[[Place], Found]
