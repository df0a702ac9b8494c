"""Workers and the batches that they read: in order, whatever becomes of a worker, the trainer or the iterator."""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.workers import pool as workers_module
from ssl_pipeline.data.workers.pool import RING_SHARE, read_batches
from ssl_pipeline.data.workers.ring import Layout, batch_bytes

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


class Squares:
    """Writes the squares of the positions; the extra is the last position, or what `at` does there."""

    def __init__(self, at: Mapping[int, Callable[[], object]] | None = None) -> None:
        self.at = at or {}

    def layout(self, positions: Sequence[int] | None = None) -> Layout:
        return {"squares": ((4,), torch.int64), "flag": ((), torch.bool)}

    def __call__(self, positions: Sequence[int], slot: Mapping[str, Tensor]) -> object:
        slot["squares"].copy_(torch.tensor([position**2 for position in positions]))
        slot["flag"].fill_(positions[0] % 8 == 0)
        last = positions[-1]
        return self.at[last]() if last in self.at else last


def positions_of(batch: int) -> range:
    return range(4 * batch, 4 * batch + 4)


def open_batches(
    reader: Squares | None = None, **settings: int | None
) -> Iterator[tuple[Mapping[str, Tensor], object]]:
    return read_batches(reader or Squares(), positions_of, **{"batches": None, "workers": 2} | settings)


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def wait_until(condition: Callable[[], bool], *, timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.005)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), (1, 1), (1, 3), (2, 2), (3, 1)])
def test_batches_come_in_order_each_once(workers: int, prefetch: int) -> None:
    count = 0
    for batch, (tensors, extra) in enumerate(open_batches(batches=40, workers=workers, prefetch=prefetch)):
        assert tensors["squares"].tolist() == [position**2 for position in positions_of(batch)]
        assert bool(tensors["flag"]) == (batch % 2 == 0)
        assert extra == 4 * batch + 3
        count += 1
    assert count == 40


def test_a_slow_worker_changes_no_order() -> None:
    reader = Squares({3: lambda: time.sleep(0.3), 11: lambda: time.sleep(0.1)})
    firsts = [int(tensors["squares"][1] ** 0.5) for tensors, _ in open_batches(reader, batches=12)]
    assert firsts == [4 * batch + 1 for batch in range(12)]


@pytest.mark.parametrize("batches", [0, 1])
def test_few_batches_start_few_workers(batches: int) -> None:
    before = children()
    stream = open_batches(batches=batches, workers=4)
    read = 0
    for _ in stream:
        read += 1
        assert len(children() - before) == 1
    assert read == batches


def test_a_batch_stays_until_the_next_is_asked_for_however_late() -> None:
    stream = open_batches(workers=2, prefetch=2)
    for batch in range(8):
        tensors, _ = next(stream)
        time.sleep(0.02)  # the workers fill all other slots
        assert tensors["squares"].tolist() == [position**2 for position in positions_of(batch)]


def test_workers_read_ahead_as_far_as_there_is_room(tmp_path: Path) -> None:
    class Noted(Squares):
        def __call__(self, positions: Sequence[int], slot: Mapping[str, Tensor]) -> object:
            (tmp_path / str(positions[0] // 4)).touch()
            return super().__call__(positions, slot)

    stream = open_batches(Noted(), workers=2, prefetch=3)
    next(stream)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2 * 3 + 2)
    next(stream)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2 * 3 + 3)


class Growing(Squares):
    """Batch b has b % 7 + 1 times the bytes of the first one, and number `huge` a hundred times as many."""

    def __init__(self, usual: int = 1, huge: int = -1) -> None:
        super().__init__()
        self.usual = usual
        self.huge = huge

    def layout(self, positions: Sequence[int] | None = None) -> Layout:
        batch = None if positions is None else positions[0] // 4
        times = self.usual if batch is None else 100 if batch == self.huge else batch % 7 + 1
        return super().layout() | {"bytes": ((times * 5000,), torch.uint8)}

    def __call__(self, positions: Sequence[int], slot: Mapping[str, Tensor]) -> object:
        slot["bytes"].fill_(positions[0] // 4 % 251)
        return super().__call__(positions, slot) if positions[0] // 4 != self.huge else os.getpid()


@pytest.mark.parametrize("usual", [1, 4, 7])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_each_batch_has_the_room_that_it_needs(usual: int, workers: int) -> None:
    for batch, (tensors, extra) in enumerate(open_batches(Growing(usual), batches=60, workers=workers)):
        assert len(tensors["bytes"]) == 5000 * (batch % 7 + 1)
        assert tensors["bytes"].eq(batch % 251).all()
        assert tensors["squares"].tolist() == [position**2 for position in positions_of(batch)]
        assert extra == 4 * batch + 3


@needs_proc
@pytest.mark.parametrize("huge", [0, 1, 9, 39])
def test_a_batch_larger_than_the_ring_is_read_here(huge: int) -> None:
    readers = [extra for _, extra in open_batches(Growing(4, huge), batches=40, workers=2)]
    assert readers == [os.getpid() if batch == huge else 4 * batch + 3 for batch in range(40)]


def test_batches_that_are_all_larger_than_the_ring_come_in_order() -> None:
    class Huge(Growing):
        def layout(self, positions: Sequence[int] | None = None) -> Layout:
            return {"bytes": ((1 if positions is None else 10**6,), torch.uint8)} | Squares.layout(self)

    assert [extra for _, extra in open_batches(Huge(), batches=9)] == [4 * batch + 3 for batch in range(9)]


def test_batches_of_one_size_share_a_few_places() -> None:
    places = {tensors["squares"].data_ptr() for tensors, _ in open_batches(batches=50, workers=2, prefetch=1)}
    assert 1 < len(places) <= 2 * 1 + 2


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_data_error_comes_in_its_turn_and_as_it_was(workers: int) -> None:
    reader = Squares({19: raising(DataError("Cannot decode shard.tar, key 'a', byte 0: no image."))})
    stream = open_batches(reader, workers=workers)
    assert [next(stream)[1] for _ in range(4)] == [3, 7, 11, 15]
    with pytest.raises(DataError) as error:
        next(stream)
    assert str(error.value) == "Cannot decode shard.tar, key 'a', byte 0: no image."
    assert not getattr(error.value, "__notes__", [])


def test_other_errors_keep_their_kind_and_say_where_they_were_raised() -> None:
    stream = open_batches(Squares({3: raising(FileNotFoundError(2, "No such file", "shard.tar"))}))
    with pytest.raises(FileNotFoundError, match=r"shard\.tar") as error:
        next(stream)
    assert "In a data worker" in error.value.__notes__[0]
    assert "in fail" in error.value.__notes__[0]


def test_errors_that_cannot_travel_are_told() -> None:
    class PeculiarError(Exception):
        def __init__(self, first: int, second: int) -> None:
            super().__init__(f"{first} and {second}")

    with pytest.raises(RuntimeError, match="PeculiarError: 1 and 2"):
        next(open_batches(Squares({3: raising(PeculiarError(1, 2))})))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_result_that_cannot_travel_is_told_in_its_turn(workers: int) -> None:
    stream = open_batches(Squares({7: threading.Lock}), workers=workers)
    assert next(stream)[1] == 3
    with pytest.raises(TypeError) as error:
        next(stream)
    assert str(error.value) == (
        "A data worker cannot send what its reader returned, a lock: TypeError: cannot pickle '_thread.lock' object"
    )
    assert "In a data worker" in error.value.__notes__[0]


def test_errors_with_what_cannot_travel_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"ValueError: <unlocked _thread\.lock"):
        next(open_batches(Squares({3: raising(ValueError(threading.Lock()))})))


class Unreadable:
    """Travels, but cannot be put together again."""

    def __getstate__(self) -> tuple[int]:
        return (1,)

    def __setstate__(self, state: tuple[int]) -> None:
        raise EOFError("an error of its own")


def test_a_result_that_arrives_broken_is_no_dead_worker() -> None:
    with pytest.raises(EOFError, match="an error of its own"):
        next(open_batches(Squares({3: Unreadable})))


@needs_proc
@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_worker_is_an_error_at_once(busy: bool) -> None:
    before = children()
    stream = open_batches(Squares({15: lambda: time.sleep(60)} if busy else None))
    next(stream)
    for victim in children() - before if busy else [min(children() - before)]:
        os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(DataError) as error:  # noqa: PT012
        for _ in stream:
            assert time.monotonic() - started < 5
    assert str(error.value) == (
        "A data worker died: killed by signal 9. The machine may have run out of memory; "
        "try fewer data.workers or a smaller data.prefetch or batch_size."
    )
    assert time.monotonic() - started < 5
    assert children() == before


@needs_proc
def test_a_worker_that_leaves_is_an_error() -> None:
    with pytest.raises(DataError, match="A data worker died: exit code 3") as error:
        next(open_batches(Squares({3: lambda: os._exit(3)})))
    assert "memory" not in str(error.value)  # of which it would have been killed


# memory


def with_room_for(slots: float, monkeypatch: pytest.MonkeyPatch) -> None:
    free = slots * batch_bytes(Squares().layout()) / RING_SHARE
    monkeypatch.setattr(workers_module, "free_host_bytes", lambda: int(free))


def test_where_there_is_room_everybody_gets_batches_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room_for(2 * 3 + 2.5, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = open_batches(batches=40, prefetch=3)
        assert len({tensors["squares"].data_ptr() for tensors, _ in stream}) == 2 * 3 + 2


@needs_proc
@pytest.mark.parametrize(("room", "slots", "workers"), [(7.9, 7, 4), (4.2, 4, 2), (3, 3, 1), (1.6, 3, 1)])
def test_where_memory_is_short_there_are_fewer_slots_and_no_worker_without_one(
    room: float, slots: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(room, monkeypatch)
    before, places, extras = children(), set[int](), list[object]()
    stream = open_batches(batches=40, workers=4)
    with pytest.warns(UserWarning, match="Smaller batches") as told:
        extras.append(next(stream)[1])
    assert len(children() - before) == workers
    for batch, (tensors, extra) in enumerate(stream, start=1):
        assert tensors["squares"].tolist() == [position**2 for position in positions_of(batch)]
        places.add(tensors["squares"].data_ptr())
        extras.append(extra)
    assert extras == [4 * batch + 3 for batch in range(40)]
    assert len(places) == slots
    assert [str(warning.message) for warning in told] == [
        f"{workers} instead of 4 workers read images, and {slots} instead of 10 batches of 8.19e-06 GB are in memory, "
        f"of which this process may still take {room * 4 * 8.192e-06:.3g} GB. Smaller batches leave room for more."
    ]


def test_batches_too_large_for_the_memory_are_refused_before_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room_for(1.4, monkeypatch)
    before = children()
    with pytest.raises(DataError) as error:
        next(open_batches(workers=4))
    assert children() == before
    assert str(error.value) == (
        "3 batches of 8.19e-06 GB, the least that workers need, take more than half of the 4.59e-05 GB of memory that "
        "this process may still take. Make the batches smaller."
    )


def test_of_several_processes_the_first_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room_for(4, monkeypatch)
    monkeypatch.setattr(workers_module, "rank", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(open_batches(batches=5, workers=4))) == 5


@needs_proc
@pytest.mark.parametrize("end", ["close", "forget", "exhaust", "fail"])
def test_the_workers_end_with_the_iterator(end: str) -> None:
    gc.collect()  # what other tests left
    before = children()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    reader = Squares({3 if end == "fail" else -1: raising(DataError("broken"))})
    stream = open_batches(reader, batches=3)
    with contextlib.suppress(DataError):
        next(stream)
    if end == "close":
        stream.close()
    elif end == "exhaust":
        assert len(list(stream)) == 2
    elif end == "forget":
        assert len(children() - before) == 2
        del stream
        gc.collect()
    assert children() == before
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def train(report: Connection) -> None:
    stream = open_batches(Squares({31: lambda: time.sleep(60)}))
    other = open_batches(workers=1)  # whose worker inherits the pipes of the first two
    next(stream), next(other)
    report.send(sorted(children()))
    for _ in stream:
        time.sleep(0.01)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_leaves_no_worker_and_no_memory(number: signal.Signals) -> None:
    shared = set(Path("/dev/shm").iterdir())
    context = multiprocessing.get_context("fork")
    report, its_end = context.Pipe(duplex=False)
    trainer = context.Process(target=train, args=(its_end,))
    trainer.start()
    workers = report.recv()
    assert len(workers) == 3
    assert all(map(is_running, workers))
    assert set(Path("/dev/shm").iterdir()) <= shared  # memory with a name would outlive its processes
    os.kill(trainer.pid, number)
    trainer.join()
    wait_until(lambda: not any(map(is_running, workers)))


TRAINER = """
import sys
sys.path.insert(0, {root!r})
from tests.data.workers.test_pool import open_batches, children
stream = open_batches()
next(stream)
print(*children(), flush=True)
raise SystemError("amid the stream")
"""


@needs_proc
def test_a_trainer_that_fails_amid_the_stream_ends() -> None:
    # the stream is still there when the interpreter exits and waits for the workers
    script = TRAINER.format(root=str(Path(__file__).parents[3]))
    trainer = subprocess.run([sys.executable, "-c", script], timeout=300, capture_output=True, text=True)
    assert trainer.returncode == 1
    assert trainer.stderr.strip().endswith("\nSystemError: amid the stream")
    assert not any(is_running(int(worker)) for worker in trainer.stdout.split())
    assert len(trainer.stdout.split()) == 2


@needs_proc
def test_preemption_signals_leave_workers_alive() -> None:
    before = children()
    stream = open_batches(batches=12)
    next(stream)
    kills = (f"kill -TERM {worker}; kill -INT {worker}; kill -USR1 {worker}" for worker in children() - before)
    subprocess.run(["sh", "-c", "; ".join(kills)], check=True)  # not from the trainer, as a scheduler sends them
    assert len(list(stream)) == 11


@needs_proc
def test_a_fork_of_the_trainer_leaves_the_workers_alone() -> None:
    stream = open_batches(batches=4)
    next(stream)
    fork = os.fork()
    if fork == 0:
        stream.close()
        os._exit(0)
    os.waitpid(fork, 0)
    assert len(list(stream)) == 3


def test_more_than_a_pipe_holds_may_travel_beside_a_slot() -> None:
    reader = Squares({position: lambda: bytes(1_000_000) for position in (3, 11, 19)})
    extras = [extra for _, extra in open_batches(reader, batches=6)]
    assert extras == [bytes(1_000_000), 7, bytes(1_000_000), 15, bytes(1_000_000), 23]


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len(list(open_batches(batches=3))) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_streams_that_share_the_memory_take_their_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room_for(8, monkeypatch)
    slots = []
    for share in (0.75, 0.5):
        stream = read_batches(Squares(), positions_of, batches=40, workers=4, memory_share=share)
        with pytest.warns(UserWarning, match="Smaller batches"):
            slots.append(len({tensors["squares"].data_ptr() for tensors, _ in stream}))
    assert slots == [6, 4]
