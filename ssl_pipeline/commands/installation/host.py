"""Cores, memory, shared memory, open files, disk."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ssl_pipeline.commands.installation.finding import Finding, reason
from ssl_pipeline.machine import cores_per_process, free_host_bytes

GIB = 1 << 30
SHARED = Path("/dev/shm")
LEAST_SHARED = GIB  # batches of four workers at 2 x 224 and 8 x 96 pixels, 64 images each: 0.6 GB
LEAST_MEMORY, LEAST_DISK = 4 * GIB, 10 * GIB
LEAST_FILES = 4096  # shards that are open, times workers


def check_cores_and_memory() -> Iterator[Finding]:
    """What this process may take, limits of its container included."""
    cores, memory = cores_per_process(), free_host_bytes()
    told = f"{cores:g} cores, {memory / GIB:.1f} GiB of memory free"
    if memory < LEAST_MEMORY:
        yield Finding("note", "machine", told, "Lower data.workers and data.batch_size if a run is killed for memory.")
    else:
        yield Finding("ok", "machine", told)


def check_shared_memory(place: Path = SHARED) -> Iterator[Finding]:
    """Where workers hand batches over; containers have 64 MB of it unless told otherwise."""
    try:
        space = os.statvfs(place)
        free = space.f_bavail * space.f_frsize
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"written")
    except OSError as error:
        told = f"{place} cannot be used: {reason(error)}"
        yield Finding("wrong", "shared memory", told, "data.workers=0 works without it; in containers mount /dev/shm.")
        return
    told = f"{free / GIB:.2g} GiB free in {place}"
    if free < LEAST_SHARED:
        advice = "Containers: docker run --shm-size=8g (or --ipc=host). Otherwise fewer data.workers are started."
        yield Finding("note", "shared memory", told, advice)
    else:
        yield Finding("ok", "shared memory", told)


def check_open_files() -> Iterator[Finding]:
    """The limit of this shell on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        told, advice = f"at most {soft:,}", f"ulimit -n {hard if hard != resource.RLIM_INFINITY else 65536}"
        yield Finding("note", "open files", told, f"Data sets of many shards need more: {advice}")
    else:
        yield Finding("ok", "open files", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,}")


def check_disk(place: Path | None = None) -> Iterator[Finding]:
    """Where runs go: below the directory of the call."""
    place = place or Path.cwd()
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"written")
    except OSError as error:
        yield Finding("wrong", "disk", f"{place} cannot be written: {reason(error)}", "Start from another directory.")
        return
    free = shutil.disk_usage(place).free
    told = f"{free / GIB:.0f} GiB free in {place}"
    if free < LEAST_DISK:
        yield Finding("note", "disk", told, "Images are packed next to the run, at full size; output=DIR moves it.")
    else:
        yield Finding("ok", "disk", told)
