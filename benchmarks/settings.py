"""What the command is told, and what every benchmark gets to know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from benchmarks.hardware import has_bf16_units
from ssl_pipeline.config import Config

Name = Literal[
    "input",
    "end_to_end",
    "scaling",
    "photometric",
    "step",
    "ema",
    "head",
    "nt_xent",
    "knn",
    "linear",
    "start_up",
    "cost_growth",
]
Size = Literal["tiny", "small", "large"]


class BenchmarkConfig(Config):
    """Measure this library and its peers on this machine, in interleaved rounds.

    Peers that are not installed (`pip install -e '.[bench]'`) are named and left out. Results go to
    output/results.json after each benchmark; each table shows medians, and how many times faster than each reference
    (median, smallest and largest of the rounds).
    """

    only: tuple[Name, ...] = ()
    """Benchmarks to run, for instance only=input,step; all of them by default."""
    rounds: Annotated[int, Field(ge=1)] = 5
    """Units that each contestant does; the order rotates from round to round."""
    seconds: Annotated[float, Field(gt=0)] = 30.0
    """Time for one table: no round begins that would end after it, once there are three."""
    shortest: Annotated[float, Field(ge=0)] = 0.3
    """Seconds that a sample takes at least: shorter units are repeated."""
    output: Path = Path("runs/benchmarks")
    """Directory for results.json."""
    imagenet: Path | None = None
    """Folder or zip of photographs as JPEG; by default parts of the two that come with scikit-learn."""
    cifar10: Path | None = None
    """Folder or zip of 32-pixel images; by default small parts of the same photographs."""
    images: Annotated[int, Field(ge=1)] = 32
    """Images that one unit of `input` decodes; the same for all contestants."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Reading processes of `end_to_end`, and of each training process where `scaling` counts these."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the steps run; auto takes a GPU if there is one."""
    size: Literal["auto", "tiny", "small", "large"] = "auto"
    """Networks and batches: small for CPUs, large for GPUs (auto chooses), tiny to see whether all runs."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """Autocast of the steps; auto takes bf16 where the device has units for it, else float32."""
    compile: bool | None = None
    """Whether our steps run compiled too. null: on a GPU; on CPUs it takes many minutes and a C++ compiler."""
    peak_tflops: Annotated[float | None, Field(gt=0)] = None
    """Peak of the device in TFLOP/s at this precision, for the share of it that is reached; known for common GPUs."""

    def torch_device(self) -> torch.device:
        """The device that `device` stands for."""
        available = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(available if self.device == "auto" else self.device)

    def chosen_size(self) -> Size:
        """The size that `size` stands for."""
        if self.size == "auto":
            return "large" if self.torch_device().type == "cuda" else "small"
        return self.size

    def compiles(self) -> bool:
        """Whether compiled steps take part."""
        return self.torch_device().type == "cuda" if self.compile is None else self.compile

    def autocast(self) -> bool:
        """Whether steps run under bf16 autocast."""
        return has_bf16_units(self.torch_device()) if self.precision == "auto" else self.precision == "bf16"
