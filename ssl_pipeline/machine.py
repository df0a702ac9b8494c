"""What this machine or container gives a process: memory, of a GPU too, and cores; and how freed memory is kept.

Commands that need no torch ask for cores: it is imported only where a GPU is looked at.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path("/")
LIMITS = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}  # control groups v2, v1
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt: more free bytes go back, larger blocks are mapped separately
ALL_KEPT, AS_BY_DEFAULT = 2**31 - 1, 2**25  # bytes: all that mallopt takes, and where the C library itself ends
RECLAIMABLE = ("inactive_file", "active_file")  # read from disk, and given up when memory is needed


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU what nothing uses, of the host this process's share; None for other devices, where it is unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes() if device.type == "cpu" else None


def processes_here() -> int:
    """The processes of this machine, by what the launcher says; 1 where it says nothing."""
    number = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(number), 1) if number.isdecimal() else 1


def free_host_bytes() -> int:
    """What the machine has left, or the container if that is less; the processes of a machine share it equally."""
    return max(min([_left_on_machine(), *_left_in_groups()]), 0) // processes_here()


def _left_on_machine() -> int:
    try:
        lines = dict(line.split(":") for line in (ROOT / "proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux, or an old one: all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_groups() -> Iterator[int]:
    """For each limit on this process's control groups and those around them, what is left of it.

    https://docs.kernel.org/admin-guide/cgroup-v2.html; a container may see its own group as the root.
    """
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = ROOT / "sys/fs/cgroup" / controllers
        for group in (Path(path), *Path(path).parents):
            yield from _left_in(top / group.relative_to("/"))


def _left_in(group: Path) -> Iterator[int]:
    for limit, used in LIMITS.items():
        try:
            left = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # no such file, or "max" for a limit
            continue
        yield left + _reclaimable(group)


def _reclaimable(group: Path) -> int:
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(statistics.get(f"total_{name}", statistics.get(name, 0))) for name in RECLAIMABLE)


def cores_per_process() -> float:
    """The CPU cores that each training process of this machine may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _container_cores()) / processes_here()


def whole_cores() -> int:
    """`cores_per_process` as a number of workers: whole ones, at least 1."""
    return max(int(cores_per_process()), 1)


def _container_cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """The cores that a container is held to (https://docs.kernel.org/admin-guide/cgroup-v2.html)."""
    try:
        quota, period = limit.read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no such file, or "max" for a quota
        return float("inf")


def keep_freed_memory(*, most: int = ALL_KEPT) -> bool:
    """Have the C library keep up to `most` freed bytes for the next batch; whether it does.

    By default it gives blocks above 32 MB back to the system as soon as they are freed. Activations of a batch are such
    blocks, and the system clears each page again before the next batch has it: a third of a step of EfficientNet-Lite0
    at 96 pixels. What the environment says (MALLOC_..., GLIBC_TUNABLES) stays; other C libraries are left as they are.
    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    library = ctypes.CDLL(None)
    said = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if said or not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(MMAP_THRESHOLD, most) and library.mallopt(TRIM_THRESHOLD, most))
