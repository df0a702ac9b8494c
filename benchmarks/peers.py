"""What is measured only where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from shutil import which

import torch

INSTALL = "not installed; pip install -e '.[bench]'"


def missing(*packages: str) -> dict[str, str]:
    """The packages that are not installed, each with what to do about it."""
    return {package: INSTALL for package in packages if find_spec(package) is None}


def why_not_compiled(device: torch.device) -> str:
    """What torch.compile lacks on a device; empty if nothing."""
    if device.type == "cuda":
        return "" if find_spec("triton") else "torch.compile needs triton"
    return "" if any(map(which, ("g++", "clang++"))) else "torch.compile needs a C++ compiler (g++)"
