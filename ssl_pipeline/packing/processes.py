"""A function of many tasks in several processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ssl_pipeline.data.shards.open import DataError
from ssl_pipeline.machine import whole_cores

MAX_DEFAULT_WORKERS = 16
Task = TypeVar("Task")
Result = TypeVar("Result")


def run_in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int | None
) -> Iterator[tuple[int, Result]]:
    """Number and result of each task, in order.

    `workers=None` takes one process per core (a container may have few), at most 16. All end with this one, however it
    ends.
    """
    processes = min(workers or min(whole_cores(), MAX_DEFAULT_WORKERS), len(tasks))
    if processes <= 1:
        yield from enumerate(map(function, tasks))
        return
    pool = ProcessPoolExecutor(processes, initializer=_start, initargs=(os.getpid(),))
    try:
        yield from enumerate(pool.map(function, tasks))
    except BrokenProcessPool:
        raise DataError("A process died; the machine may have run out of memory. Try fewer workers.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(parent: int) -> None:
    """An interrupt is the parent's to handle; a killed parent cannot, so its processes look for themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
