"""What the command is told, and the machine that it runs on."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Annotated, Literal

import torch
from pydantic import Field

from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, Config, load
from ssl_pipeline.eval.search.neighbours import has_bfloat16_units
from ssl_pipeline.files import JSON
from ssl_pipeline.machine import whole_cores
from ssl_pipeline.run.provenance import cpu_name, version_of

OfInput = Literal["input", "end_to_end", "scaling", "photometric"]
OfTraining = Literal["step", "ema", "head", "nt_xent"]
Name = Literal[OfInput, OfTraining, "knn", "linear", "start_up", "cost_growth"]
Size = Literal["tiny", "small", "large"]

PACKAGES = ("torch", "torchvision", "timm", "pillow", "webdataset", "faiss-cpu", "lightly", "kornia")
# Dense bf16 TFLOP/s that the makers give for a GPU; a part of the name that torch reports. The first that fits counts.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125}


class BenchmarkConfig(Config):
    """Measure this library and its peers on this machine, in interleaved rounds.

    Peers that are not installed (`pip install -e '.[bench]'`) are named and left out. Results go to
    output/results.json after each benchmark; each table shows medians, and how many times faster than each reference
    (median, smallest and largest of the rounds).
    """

    only: tuple[Name, ...] = ()
    """Benchmarks to run, for instance only=input,step; all of them by default."""
    rounds: Annotated[int, Field(ge=1, le=10**6)] = 5
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
    workers: Annotated[int, Field(ge=1, le=1024)] = 2
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

    def autocasts(self) -> bool:
        """Whether steps run under bf16 autocast."""
        return has_bfloat16_units(self.torch_device()) if self.precision == "auto" else self.precision == "bf16"

    def autocast(self) -> torch.autocast:
        """The context that steps run in."""
        return torch.autocast(self.torch_device().type, dtype=torch.bfloat16, enabled=self.autocasts())

    def dtype(self) -> str:
        """What a table's title says of `precision`."""
        return "bf16 autocast" if self.autocasts() else "float32"

    def why_not_compiled(self) -> str:
        """Why no compiled work takes part; empty if it does."""
        on_gpu = self.torch_device().type == "cuda"
        if not (on_gpu if self.compile is None else self.compile):
            return "compile=true measures it"
        if on_gpu:
            return "" if find_spec("triton") else "torch.compile needs triton"
        return "" if any(map(which, ("g++", "clang++"))) else "torch.compile needs a C++ compiler (g++)"

    def peak_flops(self) -> float | None:
        """FLOP/s that the device can do at most: what was given, or the maker's figure for a GPU that is known."""
        tflops = self.peak_tflops
        if tflops is None and self.torch_device().type == "cuda":
            name = torch.cuda.get_device_name(self.torch_device())
            tflops = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
        return None if tflops is None else tflops * 1e12

    def hardware(self) -> dict[str, JSON]:
        """Names and counts of what the figures depend on."""
        device = self.torch_device()
        hardware: dict[str, JSON] = {
            "cpu": cpu_name(),
            "cores": whole_cores(),
            "threads": torch.get_num_threads(),
            "bf16_units": has_bfloat16_units(device),
            "python": platform.python_version(),
            "versions": {name: version_of(name) for name in PACKAGES},
        }
        if device.type == "cuda":
            hardware["gpu"] = torch.cuda.get_device_name(device)
            hardware["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
        return hardware


def settings_of(recipe: str) -> PretrainConfig:
    """What `pretrain.py recipe=NAME --print` shows."""
    return load(PretrainConfig, [f"recipe={recipe}"], recipes=RECIPES)
