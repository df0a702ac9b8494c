"""Worker processes that read batches into shared memory; what travels is the number of a batch and its place."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import select
import signal
import struct
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.workers.ring import Layout, Reader, Ring, batch_bytes, tensors_at
from ssl_pipeline.distributed import rank
from ssl_pipeline.machine import AS_BY_DEFAULT, free_host_bytes, keep_freed_memory

HELD_BATCHES = 2  # by the trainer: the one in use, and the one before it while its copy to the device is under way
LEAST_BATCHES = HELD_BATCHES + 1  # and one to write
RING_SHARE = 0.25  # of the memory that this process may still take, for the batches of all its streams
LARGEST_SHARE = 0.5  # that the least number of batches may take
TASK = struct.Struct("qq")  # number of a batch and the first byte of its place; so short a message is never torn
TRAINER_CHECK = 1.0  # seconds after which a worker that is busy or stuck notices that its trainer is gone

Content = TypeVar("Content")  # what a reader returns
PositionsOf = Callable[[int], Sequence[int]]  # number of a batch -> positions of its samples


def read_batches(
    reader: Reader[Content],
    positions_of: PositionsOf,
    *,
    batches: int | None,
    workers: int,
    prefetch: int = 2,
    memory_share: float = 1.0,
) -> Iterator[tuple[Mapping[str, Tensor], Content]]:
    """Tensors and extra that `reader` makes of the positions of batch 0, 1, ... in order: of `batches`, or without end.

    `workers` processes read `prefetch` batches each ahead, or fewer where memory is short, with a warning; with 0 this
    one reads. Each batch takes the memory that its own layout needs, of a ring with room for that many usual ones; this
    process reads one that is larger than the whole ring itself. `memory_share`: of the memory for batches, where
    streams share it. The tensors are overwritten once the next batch is asked for: whatever is to last longer must be
    copied. (Copies to a GPU that were started on the current stream may still run then.) What `reader` raises is raised
    here, in its turn; the death of a worker is a DataError at once. The workers end with the iterator, and with this
    process, however it ends.
    """
    numbers = itertools.count() if batches is None else range(batches)
    here = _ReadHere(reader)
    if workers == 0:
        for number in numbers:
            yield here.read(positions_of(number))
        return
    if batches is not None:
        workers = min(workers, batches)
    usual = batch_bytes(reader.layout())
    count, workers = _within_memory(usual, workers, prefetch, memory_share)
    ring = Ring(count * usual, count)
    crew = _Crew(reader, positions_of, ring, batches)
    try:
        crew.start(workers)
        ring.lock_pages()  # after the fork: workers have no part in CUDA
        for number in numbers:
            found = crew.batch(number)
            if found is None:
                yield here.read(positions_of(number))
            else:
                yield found
                ring.give_back()
    finally:
        crew.end()


class _ReadHere(Generic[Content]):
    """Batches that this process reads itself, into memory that is used again."""

    def __init__(self, reader: Reader[Content]) -> None:
        self.reader = reader
        self.block = torch.empty(0, dtype=torch.uint8)

    def read(self, positions: Sequence[int]) -> tuple[Mapping[str, Tensor], Content]:
        layout = self.reader.layout(positions)
        if (size := batch_bytes(layout)) > len(self.block):
            self.block = torch.empty(size, dtype=torch.uint8)
        tensors = tensors_at(self.block, 0, layout)
        return tensors, self.reader(positions, tensors)


def _within_memory(size: int, workers: int, prefetch: int, share: float) -> tuple[int, int]:
    """How many batches of `size` bytes there will be, and workers: what is asked for, or what the memory has room for.

    Each worker writes its own batch: more workers would wait. Raises DataError if not even one can.
    """
    free, wanted = free_host_bytes(), workers * prefetch + HELD_BATCHES
    if LEAST_BATCHES * size > LARGEST_SHARE * share * free:
        raise DataError(
            f"{LEAST_BATCHES} batches of {size / 1e9:.3g} GB, the least that workers need, take more than half of the "
            f"{share * free / 1e9:.3g} GB of memory that this process may still take. Make the batches smaller."
        )
    count = min(wanted, max(int(RING_SHARE * share * free / max(size, 1)), LEAST_BATCHES))
    writing = min(workers, count - HELD_BATCHES)
    if count < wanted and rank() == 0:
        warnings.warn(
            f"{writing} instead of {workers} workers read images, and {count} instead of {wanted} batches of "
            f"{size / 1e9:.3g} GB are in memory, of which this process may still take {free / 1e9:.3g} GB. "
            "Smaller batches leave room for more.",
            stacklevel=3,
        )
    return count, writing


class _Crew(Generic[Content]):
    """The workers, as their trainer sees them.

    All read their tasks from one pipe, so the next free worker takes the next batch; each sends its results through a
    pipe of its own, which the system closes with the process.
    """

    def __init__(self, reader: Reader[Content], positions_of: PositionsOf, ring: Ring, batches: int | None) -> None:
        self.reader = reader
        self.positions_of = positions_of
        self.ring = ring
        self.batches = batches
        self.trainer = os.getpid()
        self._reading, self._tasks = os.pipe()
        self._workers: dict[int, tuple[Connection, BaseProcess]] = {}  # by the descriptor of the connection
        self._results = select.poll()
        self._asked = 0  # batches that the workers were asked for so far, or were too large for them
        self._coming: Layout | None = None  # of the next one to ask for, where it had no room so far
        self._tensors: dict[int, Mapping[str, Tensor]] = {}  # of those that were asked for and not given out
        self._done: dict[int, Content | _Failure] = {}

    def start(self, workers: int) -> None:
        context = multiprocessing.get_context("fork")  # Python 3.14's fork server has no parent here
        for _ in range(workers):
            results, sending = context.Pipe(duplex=False)
            pipes = _Pipes(self._reading, self._tasks, sending)
            process = context.Process(
                target=_work, args=(self.reader, self.positions_of, self.ring, pipes, self.trainer), daemon=True
            )
            process.start()
            sending.close()  # now only the worker's
            self._workers[results.fileno()] = results, process
            self._results.register(results, select.POLLIN)

    def batch(self, number: int) -> tuple[Mapping[str, Tensor], Content] | None:
        """Tensors and extra of a batch, None if the ring is too small for it; call with 0, 1, 2, ..."""
        self._ask_ahead(number)
        if number not in self._tensors:
            return None
        while number not in self._done:
            for descriptor, _ in self._results.poll():
                self._receive(*self._workers[descriptor])
        outcome = self._done.pop(number)
        if isinstance(outcome, _Failure):
            raise outcome.error
        return self._tensors.pop(number), outcome

    def _ask_ahead(self, number: int) -> None:
        """Ask for batches as far as there is room, and not beyond one that this process must read itself."""
        while self._asked != self.batches:
            layout = self._coming = self._coming or self.reader.layout(self.positions_of(self._asked))
            if (size := batch_bytes(layout)) <= len(self.ring.block):
                start = self.ring.take(size, wait=self._asked <= number)
                if start is None:
                    return
                self._tensors[self._asked] = tensors_at(self.ring.block, start, layout)
                os.write(self._tasks, TASK.pack(self._asked, start))
            elif self._asked > number:
                return
            self._asked, self._coming = self._asked + 1, None

    def _receive(self, results: Connection, process: BaseProcess) -> None:
        try:
            message = results.recv_bytes()
        except (EOFError, OSError):
            raise _died(process) from None
        number, outcome = ForkingPickler.loads(message)
        self._done[number] = outcome

    def end(self) -> None:
        """End the workers, wherever they are: they hold nothing that another process would miss."""
        if os.getpid() != self.trainer:
            return  # a fork of the trainer forgets a stream that is not its own
        for _, process in self._workers.values():
            process.kill()
        for results, process in self._workers.values():
            process.join()
            process.close()
            results.close()
        os.close(self._tasks)
        os.close(self._reading)
        self.ring.unlock_pages()


def _died(process: BaseProcess) -> DataError:
    process.join(1)
    code = process.exitcode
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        why = "The machine may have run out of memory; try fewer data.workers or a smaller data.prefetch or batch_size."
    else:
        why = "What it printed last may say why; data.workers=0 reads without workers, and shows where."
    return DataError(f"A data worker died: {how}. {why}")


@dataclass(frozen=True)
class _Pipes:
    """A worker's ends of the pipes, and the one that it must close: the tasks end with the last process that has it."""

    tasks: int
    foreign: int
    results: Connection


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker."""

    error: Exception


def _work(reader: Reader[Content], positions_of: PositionsOf, ring: Ring, pipes: _Pipes, trainer: int) -> None:
    """One worker: read batch after batch, as long as there is a trainer."""
    start_worker(trainer)
    os.close(pipes.foreign)
    with suppress(BrokenPipeError):
        while task := os.read(pipes.tasks, TASK.size):
            number, start = TASK.unpack(task)
            try:
                positions = positions_of(number)
                tensors = tensors_at(ring.block, start, reader.layout(positions))
                message = _packed(number, reader(positions, tensors))
            except Exception as error:
                message = _packed(number, _Failure(_portable(error)))
            pipes.results.send_bytes(message)


def _packed(number: int, outcome: object) -> memoryview:
    try:
        return ForkingPickler.dumps((number, outcome))
    except Exception as error:
        what = type(outcome).__name__
        reason = f"{type(error).__name__}: {error}"
        raise TypeError(f"A data worker cannot send what its reader returned, a {what}: {reason}") from None


def _portable(error: Exception) -> Exception:
    """The error in a form that can be sent; all except a DataError say where they come from."""
    if isinstance(error, DataError):
        return error
    trace = "".join(traceback.format_exception(error))
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
        survives = type(error).__module__ == "builtins"  # others may lose the note on the way
    except Exception:
        survives = False
    if not survives:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a data worker:\n{trace}")
    return error


def start_worker(trainer: int) -> None:
    """Only the trainer itself can end a worker: by SIGTERM, SIGKILL or its own death.

    A preemption signal reaches the whole process group, and a worker that died of it would take the save with it.
    Ignoring SIGTERM completely does not work: a trainer that exits sends it to its workers, and waits for them.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory(most=AS_BY_DEFAULT)  # the trainer's is for activations; a photograph of 150 MB is to go back
    if hasattr(signal, "sigtimedwait"):  # all but macOS, where a worker has to die of it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(trainer,), daemon=True).start()


def _obey(trainer: int) -> None:
    while os.getppid() == trainer:
        received = signal.sigtimedwait({signal.SIGTERM}, TRAINER_CHECK)
        if received is not None and received.si_pid == trainer:
            break
    os._exit(0)
