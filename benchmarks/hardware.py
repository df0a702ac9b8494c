"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ssl_pipeline.files import JSON

PACKAGES = ("torch", "torchvision", "timm", "pillow", "webdataset", "faiss-cpu", "lightly", "kornia")
# Dense bf16 TFLOP/s that the makers give for a GPU; a part of the name that torch reports. The first that fits counts.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}


def describe_hardware(device: torch.device) -> dict[str, JSON]:
    """Names and counts of what the figures depend on."""
    hardware: dict[str, JSON] = {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "bf16_units": has_bf16_units(device),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
        hardware["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return hardware


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """The processor's name as Linux knows it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def has_bf16_units(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool({"amx_bf16", "avx512_bf16"} & set(_cpuinfo("flags").split()))


def peak_flops(device: torch.device, tflops: float | None) -> float | None:
    """FLOP/s that the device can do at most: what was given, or the maker's figure for a GPU that is known."""
    if tflops is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None if tflops is None else tflops * 1e12


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
