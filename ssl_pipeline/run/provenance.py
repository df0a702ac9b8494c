"""Where a start of a run comes from: the command, the code, versions, machine. For `run.json`, read by people."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from ssl_pipeline import __version__
from ssl_pipeline.files import JSON

CHECKOUT = Path(__file__).parents[2]
PACKAGES = ("timm", "accelerate", "numpy", "pillow")
SECONDS_FOR_GIT = 10


def describe_start(*, num_processes: int) -> dict[str, JSON]:
    """What is known of a start before its settings count."""
    return {
        "command": shlex.join(sys.orig_argv),
        "directory": str(Path.cwd()),
        "commit": commit_of(CHECKOUT),
        "versions": {
            "ssl-pipeline": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version_of(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "hardware": {
            "processes": num_processes,
            "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
        },
    }


def commit_of(checkout: Path) -> str | None:
    """The commit of a git checkout, with "-dirty" where files differ from it; None where it is not a checkout, or
    without git."""
    if not (checkout / ".git").exists():  # a package installed somewhere inside of another checkout
        return None
    describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(describe, capture_output=True, text=True, timeout=SECONDS_FOR_GIT, check=True)
        return found.stdout.strip() or None
    return None


def version_of(package: str) -> str | None:
    """Of an installed package; None without it."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def cpu_name() -> str:
    """The name of the processor, as Linux reports it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
