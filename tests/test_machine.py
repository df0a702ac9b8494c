"""What a process may still take of the memory: the machine's, the container's, and not that of its siblings."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssl_pipeline import machine as module
from ssl_pipeline.machine import cores_per_process, free_bytes, free_host_bytes, whole_cores

Machine = Callable[..., None]
ROOT = Path(__file__).parents[1]
needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
V1 = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "caches": "total_inactive_file 30\ncache 500"}
V2 = {"limit": "memory.max", "used": "memory.current", "caches": "anon 9\ninactive_file 20\nactive_file 10"}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes a machine that has 1,024,000 bytes left, with a process in some control group."""

    def write(path: str, text: object) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    def build(line: str = "0::/", groups: dict[str, tuple[object, int]] | None = None, *, names: dict = V2) -> None:
        write("proc/meminfo", "MemTotal: 9999 kB\nMemAvailable: 1000 kB")
        write("proc/self/cgroup", f"5:pids:/other\n{line}")
        for group, (limit, used) in (groups or {}).items():
            write(f"sys/fs/cgroup/{group}/{names['limit']}", limit)
            write(f"sys/fs/cgroup/{group}/{names['used']}", used)
            write(f"sys/fs/cgroup/{group}/memory.stat", names["caches"])

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return build


def test_without_a_container_it_is_what_the_machine_has_left(machine: Machine) -> None:
    machine()
    assert free_host_bytes() == free_bytes(torch.device("cpu")) == 1_024_000


def test_a_container_holds_its_processes_to_its_limit(machine: Machine) -> None:
    machine("0::/", {"": (1000, 400)})
    assert free_host_bytes() == 630  # file caches, 30 here, are given up for whoever needs the memory


def test_the_limit_may_be_that_of_a_group_around(machine: Machine) -> None:
    machine("0::/slurm/job/step", {"slurm": ("max", 1), "slurm/job": (1000, 900), "slurm/job/step": (5000, 10)})
    assert free_host_bytes() == 130


@pytest.mark.parametrize("group", ["memory/docker/abc", "memory"])  # the latter where the container sees itself as root
def test_version_1_of_control_groups_is_known(machine: Machine, group: str) -> None:
    machine("4:memory:/docker/abc", {group: (2000, 500)}, names=V1)
    assert free_host_bytes() == 1530


def test_no_limit_is_none(machine: Machine) -> None:
    machine("0::/a", {"a": ("max", 500)})
    assert free_host_bytes() == 1_024_000
    machine("4:memory:/a", {"memory/a": (2**63 - 4096, 500)}, names=V1)
    assert free_host_bytes() == 1_024_000


def test_a_container_beyond_its_limit_has_nothing_left(machine: Machine) -> None:
    machine("0::/", {"": (1000, 1100)})
    assert free_host_bytes() == 0


def test_the_processes_of_a_machine_share_its_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("0::/", {"": (1000, 230)})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_host_bytes() == 100


def test_something_is_known_of_every_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert 0 < free_host_bytes() < 2**50
    monkeypatch.setattr(module, "ROOT", tmp_path)  # no /proc
    assert 0 < free_host_bytes() < 2**50
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("line", "group", "names"),
    [("4:memory,hugetlb:/a", "memory,hugetlb/a", V1), ("nonsense\n0::/a", "a", V2), (None, "", V2)],
)
def test_a_limit_is_found_however_the_groups_are_mounted(
    machine: Machine, tmp_path: Path, line: str | None, group: str, names: dict
) -> None:
    machine(line or "", {group: (1000, 100)}, names=names)
    if line is None:
        (tmp_path / "proc/self/cgroup").unlink()
    assert free_host_bytes() == 930


def test_a_limit_holds_where_nothing_tells_of_caches(machine: Machine, tmp_path: Path) -> None:
    machine("0::/", {"": (1000, 100)})
    (tmp_path / "sys/fs/cgroup/memory.stat").unlink()
    assert free_host_bytes() == 900


@pytest.mark.parametrize("number", ["", "0", "many"])
def test_a_launcher_that_talks_nonsense_has_one_process(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    machine()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", number)
    assert free_host_bytes() == 1_024_000


def test_processes_of_a_machine_share_its_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(module, "_container_cores", lambda: float("inf"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores_per_process() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_per_process() == 3


@pytest.mark.parametrize(("quota", "whole"), [(0.5, 1), (2.9, 2), (float("inf"), 12)])
def test_workers_are_as_many_as_whole_cores_of_the_container(monkeypatch, quota, whole):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(module, "_container_cores", lambda: quota)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert whole_cores() == whole


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", float("inf")), ("", float("inf"))]
)
def test_a_container_may_have_fewer_cores_than_the_machine(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert module._container_cores(tmp_path / "cpu.max") == cores
    assert module._container_cores(tmp_path / "missing") == float("inf")


FAULTS = """
import ctypes, resource
from ssl_pipeline.machine import keep_freed_memory

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p

def pages_cleared():
    for _ in range(2):  # the second block comes after one that has been freed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = ctypes.c_void_p(library.malloc(2**26))
        ctypes.memset(block, 1, 2**26)
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(pages_cleared(), int(keep_freed_memory()), pages_cleared())
"""


def pages_cleared_for_a_block(**said: str) -> tuple[int, bool, int]:
    """In a process of its own: the pages that the system clears for a block of 64 MB after one that has been freed,
    by default; whether `keep_freed_memory` keeps freed ones; the pages after that."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    run = [sys.executable, "-c", FAULTS]
    before, keeps, after = subprocess.check_output(run, env=kept | said, cwd=ROOT, text=True, timeout=300).split()
    return int(before), bool(int(keeps)), int(after)


@needs_glibc
def test_freed_memory_serves_the_next_batch() -> None:
    given_back, keeps, cleared = pages_cleared_for_a_block()

    assert keeps
    assert given_back > 0
    assert cleared < given_back / 10


@needs_glibc
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_the_allocator_stays(name: str) -> None:
    given_back, keeps, cleared = pages_cleared_for_a_block(
        **{name: "glibc.malloc.arena_max=1" if name == "GLIBC_TUNABLES" else "1"}
    )

    assert not keeps
    assert given_back > 0
    assert cleared > given_back / 2
