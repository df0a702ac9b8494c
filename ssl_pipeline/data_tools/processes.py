"""A function of many tasks in several processes, in order and with a progress bar."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from ssl_pipeline.data.shards.open import DataError

MAX_DEFAULT_WORKERS = 16
Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    sizes: Sequence[int],
    workers: int | None,
    description: str,
    unit: str = "image",
) -> list[Result]:
    """`function` of every task, in order; the bar adds up the sizes of what is done.

    `workers=None` takes one process per core, at most 16. The processes end with this one, however it ends.
    """
    processes = min(workers or min(os.cpu_count() or 1, MAX_DEFAULT_WORKERS), len(tasks))
    results: list[Result] = []
    with tqdm(total=sum(sizes), desc=description, unit=unit) as bar:
        if processes <= 1:
            for task, size in zip(tasks, sizes, strict=True):
                results.append(function(task))
                bar.update(size)
            return results
        pool = ProcessPoolExecutor(processes, initializer=_start, initargs=(os.getpid(),))
        try:
            for result, size in zip(pool.map(function, tasks), sizes, strict=True):
                results.append(result)
                bar.update(size)
        except BrokenProcessPool:
            raise DataError("A process died; the machine may have run out of memory. Try fewer workers.") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def _start(parent: int) -> None:
    """An interrupt is the parent's to handle; a killed parent cannot, so its processes look for themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
