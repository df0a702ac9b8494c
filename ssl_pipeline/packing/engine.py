"""Where the tasks of a data tool run: processes of this machine, or a Ray cluster (extra `ray`); one interface.

A task is about a shard: a few seconds to a minute of work, independent of the others, with the same result if it is
done twice. What is done is kept in a journal, so that a start after a crash does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, model_validator
from tqdm import tqdm

from ssl_pipeline.config import Config, bar_interval
from ssl_pipeline.files import JSON, write_text
from ssl_pipeline.packing.processes import run_in_processes
from ssl_pipeline.packing.ray_engine import NO_RAY, run_on_ray

Task = TypeVar("Task")
Result = TypeVar("Result")


class EngineChoice(Config):
    """Where the work is done."""

    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: those of a Ray cluster, or of a local Ray started for this command."""
    ray_address: str | None = None
    """With engine=ray: HOST:PORT or ray://HOST:PORT of the cluster, or auto: the one this machine is part of."""

    @model_validator(mode="after")
    def _ray_is_there(self) -> EngineChoice:
        if self.ray_address is not None and self.engine != "ray":
            raise ValueError(f"ray_address={self.ray_address} goes with engine=ray.")
        if self.engine == "ray" and find_spec("ray") is None:
            raise ValueError(NO_RAY)
        return self


class EngineConfig(EngineChoice):
    """Where the work is done, and by how many."""

    workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes; by default one per core, at most 16, or with engine=ray all that the cluster has."""


@dataclass(frozen=True)
class Journal(Generic[Result]):
    """A file of the results of tasks, a line for each as it is done; `to_json` and `from_json` are its format.

    identity: what the tasks are; with another one the file is started again.
    """

    path: Path
    identity: str
    to_json: Callable[[Result], JSON]
    from_json: Callable[[JSON], Result]

    def read(self) -> dict[int, Result]:
        """The results by the number of the task; the journal, rewritten with these, can be added to afterwards."""
        found: dict[int, Result] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if lines[:1] == [self._head()]:
            for line in lines[1:]:
                with suppress(ValueError, KeyError, TypeError):  # the last one may be cut off
                    entry = json.loads(line)
                    found[int(entry["task"])] = self.from_json(entry["result"])
        lines = [self._head(), *(self._line(task, result) for task, result in found.items())]
        write_text(self.path, "".join(lines))  # whole: a start that is killed here must lose no result
        return found

    def add(self, task: int, result: Result) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(task, result))

    def _head(self) -> str:
        return json.dumps({"tasks": self.identity}) + "\n"

    def _line(self, task: int, result: Result) -> str:
        return json.dumps({"task": task, "result": self.to_json(result)}) + "\n"


def map_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    sizes: Sequence[int],
    engine: EngineConfig,
    description: str,
    unit: str = "image",
    journal: Journal[Result] | None = None,
    gpus: int = 0,
) -> list[Result]:
    """`function` of every task, in their order; a bar shows progress and rate in the unit of `sizes`.

    The tasks that the journal has are not done again. gpus: of a task on Ray. Raises DataError for an error of a task,
    once those that are done are in the journal.
    """
    results = {} if journal is None else journal.read()
    left = [number for number in range(len(tasks)) if number not in results]
    done = sum(sizes[number] for number in results)
    with tqdm(total=sum(sizes), initial=done, desc=description, unit=unit, mininterval=bar_interval()) as bar:
        for place, result in _outcomes(function, [tasks[number] for number in left], engine, gpus):
            number = left[place]
            results[number] = result
            if journal is not None:
                journal.add(number, result)
            bar.update(sizes[number])
    return [results[number] for number in range(len(tasks))]


def _outcomes(
    function: Callable[[Task], Result], tasks: Sequence[Task], engine: EngineConfig, gpus: int
) -> Iterator[tuple[int, Result]]:
    if engine.engine == "ray":
        return run_on_ray(function, tasks, workers=engine.workers, address=engine.ray_address, gpus=gpus)
    return run_in_processes(function, tasks, workers=engine.workers)
