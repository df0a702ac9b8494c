"""Functions run in processes of their own: alone, or as the ranks of a process group (gloo, on the CPU).

The processes are forked from one clean server that has imported everything, so each starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["ssl_pipeline.commands.pretrain", "faiss", "pytest", "tests.tiny", "torch.utils.tensorboard"]
)
TIMEOUT = 60.0


class Child:
    """A function running in a process; its output and its result are files."""

    def __init__(self, function: Callable[..., object], *arguments: object, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        everything = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
        self.process = CONTEXT.Process(target=_run, args=(self.folder, everything, function, arguments))
        with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}):  # for the server
            self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit code, negative after a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} seconds:\n{self.printed()}")
        return self.process.exitcode

    def printed(self) -> str:
        file = self.folder / "printed"
        return file.read_text() if file.exists() else ""

    def result(self) -> object:
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.printed()}"
        return torch.load(self.folder / "result", weights_only=False)


def start(function: Callable[..., object], *arguments: object) -> Child:
    return Child(function, *arguments, environment={})


def start_ranks(function: Callable[..., object], *arguments: object, world_size: int = 2) -> list[Child]:
    """The same function on each rank, in the environment that torchrun makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    return [
        Child(function, *arguments, environment={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def run_on_ranks(function: Callable[..., object], *arguments: object, world_size: int = 2) -> list:
    """`function(*arguments)` inside a process group; the result of each rank."""
    return [child.result() for child in start_ranks(_in_group, function, arguments, world_size=world_size)]


def _in_group(function: Callable[..., object], arguments: Sequence[object]) -> object:
    dist.init_process_group("gloo")
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def _run(
    folder: Path, environment: Mapping[str, str], function: Callable[..., object], arguments: Sequence[object]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # data workers start as they do below a shell
    printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    try:
        torch.save(function(*arguments), folder / "result")
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
