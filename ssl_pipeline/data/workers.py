"""Batches read by worker processes: torch's DataLoader, with one-line errors and workers that outlive a preemption."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ssl_pipeline.data.errors import DataError

BatchType = TypeVar("BatchType")


def read_batches(
    read: Callable[[Sequence[int]], BatchType],
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[BatchType]:
    """Yield `read(positions)` for each batch of positions, in order, from `workers` processes (0: this one).

    `read` must be picklable. A DataError in a worker is raised here as it was there, one line without the worker's
    traceback; so is the death of a worker.
    """
    loader = DataLoader(
        _Guarded(read),
        batch_sampler=batches,  # type: ignore[arg-type]  # any sequence of positions will do, a range costs least
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if workers else None,  # Python 3.14's fork server is nobody's child
        generator=torch.Generator(),  # else every iterator draws a seed from the global generator
    )
    iterator = iter(loader)
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (OSError, EOFError) as error:
                # a batch that waits for a dead worker's file descriptors: refused, reset or no such socket
                if workers == 0 or "in DataLoader worker process" in str(error):
                    raise  # what `read` itself raised
                raise _died(error) from None
            except RuntimeError as error:
                raise worker_death(error) or error from None
            if isinstance(item, _Failure):
                raise DataError(item.sentence)
            yield item
    finally:
        del iterator  # which ends the workers, even while a traceback keeps this frame


def worker_death(error: Exception) -> DataError | None:
    """The one-line form of what torch raises when a worker was killed; None for any other error.

    Torch also raises it from a signal handler, wherever the trainer happens to be, so an engine may want to ask.
    """
    is_death = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    return _died(error) if is_death else None


def _died(error: Exception) -> DataError:
    lines = str(error).splitlines() or [type(error).__name__]
    return DataError(
        f"A data worker died: {lines[0].rstrip('. ')}. The machine may have run out of memory or of /dev/shm; "
        "try fewer data.workers or a smaller data.prefetch."
    )


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way from a worker."""

    sentence: str


class _Guarded(Dataset[BatchType | _Failure], Generic[BatchType]):
    """Errors as values: torch would wrap an exception's text in a traceback."""

    def __init__(self, read: Callable[[Sequence[int]], BatchType]) -> None:
        self.read = read

    def __getitems__(self, positions: Sequence[int]) -> BatchType | _Failure:
        try:
            return self.read(positions)
        except DataError as error:
            return _Failure(str(error))


def _as_it_is(batch: BatchType) -> BatchType:
    return batch


def start_worker(worker: int) -> None:
    """For `worker_init_fn`: only the trainer itself can end a worker.

    A preemption signal reaches the whole process group, and a worker that died of it would take the save with it. To
    ignore SIGTERM outright will not do: a trainer that exits sends it to its workers, and waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)
    if hasattr(signal, "sigwaitinfo"):  # all but macOS, where a worker has to die of it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
