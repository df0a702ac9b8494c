"""Worker processes that read batches into shared memory; what travels is the number of a batch and of its slot."""

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
from ssl_pipeline.data.workers.ring import Reader, Slots, slot_bytes
from ssl_pipeline.distributed import rank
from ssl_pipeline.machine import free_host_bytes

HELD_SLOTS = 2  # by the trainer: the batch in use, and the one before it while its copy to the device is under way
LEAST_SLOTS = HELD_SLOTS + 1  # and one to write into
RING_SHARE = 0.25  # of the memory that this process may still take, for the slots of a stream
LARGEST_SHARE = 0.5  # that the least number of slots may take
TASK = struct.Struct("qq")  # numbers of a batch and of the slot for it; so short a message is never torn
TRAINER_CHECK = 1.0  # seconds after which a worker that is busy or stuck notices that its trainer is gone

Content = TypeVar("Content")  # what a reader returns
PositionsOf = Callable[[int], Sequence[int]]  # number of a batch -> positions of its samples


def read_batches(
    reader: Reader[Content], positions_of: PositionsOf, *, batches: int | None, workers: int, prefetch: int = 2
) -> Iterator[tuple[Mapping[str, Tensor], Content]]:
    """Tensors and extra that `reader` makes of the positions of batch 0, 1, ... in order: of `batches`, or without end.

    `workers` processes read `prefetch` batches each ahead, or fewer where memory is short, of which a warning tells;
    with 0 this one reads. The tensors are overwritten once the next batch is asked for: whatever is to last longer
    must be copied. (Copies to a GPU that were started on the current stream may still run then.) What `reader` raises
    is raised here, in its turn; the death of a worker is a DataError at once. The workers end with the iterator, and
    with this process, however it ends.
    """
    numbers = itertools.count() if batches is None else range(batches)
    layout = reader.layout()
    if workers == 0:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        for number in numbers:
            yield tensors, reader(positions_of(number), tensors)
        return
    if batches is not None:
        workers = min(workers, batches)
    count, workers = _within_memory(slot_bytes(layout), workers, prefetch)
    slots = Slots(layout, count)
    crew = _Crew[Content](slots, batches)
    try:
        crew.start(reader, positions_of, workers)
        slots.lock_pages()  # after the fork: the workers are none of CUDA's business
        for number in numbers:
            slot, extra = crew.batch(number)
            yield slots.tensors[slot], extra
            slots.give_back(slot)
    finally:
        crew.end()


def _within_memory(size: int, workers: int, prefetch: int) -> tuple[int, int]:
    """How many slots of `size` bytes there will be, and workers: what is asked for, or what the memory has room for.

    Each worker writes into a slot of its own: more of them would wait. Raises DataError if not even one can.
    """
    free, wanted = free_host_bytes(), workers * prefetch + HELD_SLOTS
    if LEAST_SLOTS * size > LARGEST_SHARE * free:
        raise DataError(
            f"{LEAST_SLOTS} batches of {size / 1e9:.3g} GB, the least that workers need, take more than half of the "
            f"{free / 1e9:.3g} GB of memory that this process may still take. Make the batches smaller."
        )
    slots = min(wanted, max(int(RING_SHARE * free / max(size, 1)), LEAST_SLOTS))
    writing = min(workers, slots - HELD_SLOTS)
    if slots < wanted and rank() == 0:
        warnings.warn(
            f"{writing} instead of {workers} workers read images, and {slots} instead of {wanted} batches of "
            f"{size / 1e9:.3g} GB are in memory, of which this process may still take {free / 1e9:.3g} GB. "
            "Smaller batches leave room for more.",
            stacklevel=3,
        )
    return slots, writing


class _Crew(Generic[Content]):
    """The workers, as their trainer sees them.

    All read their tasks from one pipe, so whoever is free takes the next batch; each sends its results through a pipe
    of its own, which the system closes with the process.
    """

    def __init__(self, slots: Slots, batches: int | None) -> None:
        self.slots = slots
        self.batches = batches
        self.trainer = os.getpid()
        self._reading, self._tasks = os.pipe()
        self._workers: dict[int, tuple[Connection, BaseProcess]] = {}  # by the descriptor of the connection
        self._results = select.poll()
        self._asked = 0  # batches that the workers were asked for so far
        self._slot_of: dict[int, int] = {}  # of those that were asked for and not given out
        self._done: dict[int, Content | _Failure] = {}

    def start(self, reader: Reader[Content], positions_of: PositionsOf, workers: int) -> None:
        context = multiprocessing.get_context("fork")  # Python 3.14's fork server is nobody's child
        for _ in range(workers):
            results, sending = context.Pipe(duplex=False)
            pipes = _Pipes(self._reading, self._tasks, sending)
            process = context.Process(
                target=_work, args=(reader, positions_of, self.slots, pipes, self.trainer), daemon=True
            )
            process.start()
            sending.close()  # now the worker's alone
            self._workers[results.fileno()] = results, process
            self._results.register(results, select.POLLIN)

    def batch(self, number: int) -> tuple[int, Content]:
        """Slot and extra of a batch; call with 0, 1, 2, ..."""
        while self._asked != self.batches and (slot := self.slots.take(wait=self._asked <= number)) is not None:
            self._slot_of[self._asked] = slot
            os.write(self._tasks, TASK.pack(self._asked, slot))
            self._asked += 1
        while number not in self._done:
            for descriptor, _ in self._results.poll():
                self._receive(*self._workers[descriptor])
        outcome = self._done.pop(number)
        if isinstance(outcome, _Failure):
            raise outcome.error
        return self._slot_of.pop(number), outcome

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
        self.slots.unlock_pages()


def _died(process: BaseProcess) -> DataError:
    process.join(1)
    code = process.exitcode
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        why = "The machine may have run out of memory; try fewer data.workers or a smaller data.prefetch."
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


def _work(reader: Reader[Content], positions_of: PositionsOf, slots: Slots, pipes: _Pipes, trainer: int) -> None:
    """One worker: read batch after batch, as long as there is a trainer."""
    start_worker(trainer)
    os.close(pipes.foreign)
    with suppress(BrokenPipeError):
        while task := os.read(pipes.tasks, TASK.size):
            number, slot = TASK.unpack(task)
            try:
                message = _packed(number, reader(positions_of(number), slots.tensors[slot]))
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
    """The error, fit to travel; all but a DataError tell where they come from."""
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

    A preemption signal reaches the whole process group, and a worker that died of it would take the save with it. To
    ignore SIGTERM outright will not do: a trainer that exits sends it to its workers, and waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)
    if hasattr(signal, "sigtimedwait"):  # all but macOS, where a worker has to die of it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(trainer,), daemon=True).start()


def _obey(trainer: int) -> None:
    while os.getppid() == trainer:
        received = signal.sigtimedwait({signal.SIGTERM}, TRAINER_CHECK)
        if received is not None and received.si_pid == trainer:
            break
    os._exit(0)
