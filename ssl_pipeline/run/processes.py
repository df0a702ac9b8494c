"""The processes around this one, as Linux lists them in /proc; needs no torch."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def began(pid: int) -> int | None:
    """When a process began, in ticks since boot (numbers are given again); None for one that has ended."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def parent_of(pid: int) -> int:
    """The number of a process's parent; 0 for one that has none or has ended."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def kill_descendants() -> None:
    """SIGKILL to all that this process started, and what those started."""
    numbers = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    parents = {pid: parent_of(pid) for pid in numbers}
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    for pid in below - {os.getpid()}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, from the state on; empty for a process that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields
