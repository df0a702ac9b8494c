"""Tasks on Ray (https://docs.ray.io): a cluster, or processes that Ray starts on this machine."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.errors import DataError

NO_RAY = "engine=ray needs Ray: pip install 'ssl-pipeline[ray]'. engine=local works without it."
AHEAD = 2  # tasks per worker that Ray holds at once: memory does not grow with their number
RETRIES = 3  # of a task whose process or node was lost
SECONDS_TO_ANSWER = 10.0

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_on_ray(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int | None,
    address: str | None,
    gpus: int = 0,
) -> Iterator[tuple[int, Result]]:
    """Number and result of each task, as they are done. A task whose process is lost is done again, elsewhere.

    Raises ConfigError without Ray, or if the cluster does not answer; an error of a task is raised here.
    """
    if not tasks:
        return
    with _ray(address, workers) as ray:
        call = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(lambda work, task: work(task))
        work = ray.put(function)
        resources = ray.cluster_resources()
        if gpus and not resources.get("GPU"):
            raise ConfigError("device=cuda needs GPUs, and the Ray cluster has none. Take device=cpu.")
        slots = min(workers or 10**6, max(int(resources.get("GPU" if gpus else "CPU", 1)), 1))
        numbers = iter(range(len(tasks)))
        running: dict[object, int] = {}
        try:
            while True:
                while len(running) < AHEAD * slots and (number := next(numbers, None)) is not None:
                    running[call.remote(work, tasks[number])] = number
                if not running:
                    return
                done, _ = ray.wait(list(running))
                for reference in done:
                    yield running.pop(reference), _result_of(ray, reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _result_of(ray, reference):  # type: ignore[no-untyped-def] # Ray may not be there for the types
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise cause from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
        raise DataError(
            f"A process of Ray died {RETRIES + 1} times at the same task; it may have run out of memory. "
            "Try fewer workers."
        ) from None
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray lost one of its parts ({type(error).__name__}). The same command goes on with the rest."
        ) from None


def require_ray(address: str | None):  # type: ignore[no-untyped-def]
    """The package; raises ConfigError without it, or if nothing answers at the address. For the start of a command."""
    try:
        import ray
    except ImportError:
        raise ConfigError(NO_RAY) from None
    if address is not None and not ray.is_initialized():
        _require_answer(address)
    return ray


@contextmanager
def _ray(address: str | None, workers: int | None):  # type: ignore[no-untyped-def]
    """Ray, connected to the cluster; without an address a local one that runs inside the block."""
    ray = require_ray(address)
    if ray.is_initialized():
        yield ray
        return
    settings: dict[str, object] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:  # processes of this machine: they import what this one does
        settings |= {"num_cpus": workers, "include_dashboard": False}
        settings["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}}
        tqdm.write("Starting Ray on this machine ...", file=sys.stderr)  # above the bar of the work
    try:
        ray.init(**settings)
    except Exception as error:  # a start that takes too long is no type of its own
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if address is not None:
            raise ConfigError(f"ray_address={address} does not answer: {told}") from None
        raise ConfigError(
            f"Ray does not start here: {told.rstrip('.')}. Is the machine too busy? Try again when its load is lower, "
            "ray_address=HOST:PORT of a cluster that is up, or engine=local, which does without Ray."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise ConfigError in seconds if nothing listens at HOST:PORT; Ray itself tries for minutes."""
    if address == "auto":
        return
    match = re.fullmatch(r"(?:ray://)?([^:/]+|\[[^]]+\]):(\d{1,5})", address)
    if match is None:
        raise ConfigError(f"ray_address must be auto, HOST:PORT or ray://HOST:PORT. Got {address}.")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"ray_address={address} does not answer ({error}). Is the cluster up (ray status), and is this its address?"
        ) from None
