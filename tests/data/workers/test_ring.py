"""Batches in shared memory: where they lie, and when a place is free again."""

import os
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.workers.pool import read_batches
from ssl_pipeline.data.workers.ring import ALIGNMENT, Layout, Ring, batch_bytes, tensors_at
from tests.data.workers.test_pool import Squares, positions_of

LAYOUT: Layout = {"crops": ((2, 3, 5), torch.uint8), "labels": ((3,), torch.int64), "empty": ((0, 4), torch.float32)}
SIZE = batch_bytes(LAYOUT)


def ring_of(count: int) -> Ring:
    return Ring(count * SIZE, count)


def test_a_batch_has_the_tensors_of_the_layout_and_shares_them_with_none() -> None:
    ring = ring_of(3)
    batches = [tensors_at(ring.block, ring.take(SIZE, wait=False), LAYOUT) for _ in range(3)]
    for number, tensors in enumerate(batches):
        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == dict(LAYOUT)
        for tensor in tensors.values():
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % ALIGNMENT == 0 or tensor.numel() == 0
            tensor.fill_(number + 1)
    for number, tensors in enumerate(batches):
        assert all(tensor.eq(number + 1).all() for tensor in tensors.values())


def test_what_a_fork_writes_is_seen_here() -> None:
    ring = ring_of(2)
    fork = os.fork()
    if fork == 0:
        tensors_at(ring.block, SIZE, LAYOUT)["labels"].fill_(7)
        os._exit(0)
    os.waitpid(fork, 0)
    assert tensors_at(ring.block, SIZE, LAYOUT)["labels"].tolist() == [7, 7, 7]
    assert tensors_at(ring.block, 0, LAYOUT)["labels"].tolist() == [0, 0, 0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_memory_has_no_name_and_goes_with_its_last_view() -> None:
    def mappings() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        starts_and_ends = [[int(place, 16) for place in line.split()[0].split("-")] for line in lines]
        return [line for line, (start, end) in zip(lines, starts_and_ends, strict=True) if start <= address < end]

    ring = Ring(6 << 20, 2)
    view, address = ring.block[3 << 20 :], ring.block.data_ptr()
    (line,) = mappings()
    assert line.endswith("/dev/zero (deleted)")
    assert line.split()[1] == "rw-s"
    del ring
    assert view.sum() == 0
    del view
    assert mappings() == []


def test_places_are_taken_and_given_back() -> None:
    ring = ring_of(2)
    assert [ring.take(SIZE, wait=False), ring.take(SIZE, wait=True)] == [0, SIZE]
    assert ring.take(SIZE, wait=False) is ring.take(SIZE, wait=True) is None
    ring.give_back()
    assert ring.take(SIZE, wait=False) == 0
    ring.give_back()
    assert ring.take(SIZE, wait=False) == SIZE


def test_there_is_no_room_for_more_batches_than_agreed() -> None:
    ring = Ring(100, 2)
    assert [ring.take(1, wait=True) for _ in range(3)] == [0, 1, None]


def test_batches_of_any_size_overlap_with_none_and_lie_within() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        ring, taken = Ring(1000, int(generator.integers(1, 9))), deque[tuple[int, int]]()
        for size in generator.integers(1, int(generator.integers(2, 1002)), 200).tolist():
            while (start := ring.take(size, wait=False)) is None:
                taken.popleft()  # an empty ring has room for anything that fits at all
                ring.give_back()
            assert start >= 0
            assert start + size <= 1000
            assert all(start + size <= first or last <= start for first, last in taken)
            taken.append((start, start + size))
            assert len(taken) <= ring.most


def test_as_many_equal_batches_as_planned_find_room() -> None:
    ring = Ring(5 * 40, 5)
    starts = [ring.take(40, wait=False) for _ in range(5)]
    for number in range(23):
        ring.give_back()
        assert ring.take(40, wait=False) == starts[number % 5]


def test_what_is_larger_than_the_ring_has_no_place() -> None:
    assert Ring(100, 2).take(101, wait=True) is None


def test_too_much_memory_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"Cannot reserve 2e\+09 GB for 2 batches: .*fewer data\.workers"):
        Ring(2 * 10**18, 2)


class Device:
    """What a ring asks of CUDA; the events of `passed` have been reached."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.passed: set[int] = set()
        self.waited_for: list[int] = []
        self.registered: dict[int, int] = {}
        self.error = 0

    def cudart(self) -> "Device":
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self.error:
            self.registered[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def current_stream(self) -> mock.Mock:
        return mock.Mock()


class Event:
    device: Device

    def __init__(self, *, blocking: bool) -> None:
        assert blocking  # a host that waits must not burn a core that decodes

    def record(self) -> None:
        self.number = len(self.device.events)
        self.device.events.append(self)

    def query(self) -> bool:
        return self.number in self.device.passed

    def synchronize(self) -> None:
        if not self.query():
            self.device.waited_for.append(self.number)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    monkeypatch.setattr(Event, "device", device, raising=False)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.cudart", device.cudart)
    monkeypatch.setattr("torch.cuda.current_stream", device.current_stream)
    yield device
    assert device.registered == {}


def test_a_place_is_free_once_the_device_has_its_copy(device: Device) -> None:
    ring = ring_of(3)
    first, second, third = (ring.take(SIZE, wait=False) for _ in range(3))
    ring.give_back()
    ring.give_back()
    assert ring.take(SIZE, wait=False) is None
    device.passed = {0}
    assert ring.take(SIZE, wait=False) == first
    assert ring.take(SIZE, wait=False) is None
    assert device.waited_for == []  # the host has not waited so far
    assert ring.take(SIZE, wait=True) == second
    assert device.waited_for == [1]
    ring.give_back()
    ring.give_back()
    assert ring.take(SIZE, wait=True) == third  # the oldest, and no more than one
    assert device.waited_for == [1, 2]


def test_a_large_batch_waits_for_as_many_copies_as_it_needs(device: Device) -> None:
    ring = Ring(100, 9)
    for _ in range(4):
        ring.take(25, wait=False)
    for _ in range(3):
        ring.give_back()
    assert ring.take(50, wait=False) is None
    assert ring.take(50, wait=True) == 0
    assert device.waited_for == [0, 1]


def test_a_device_far_behind_costs_waiting_but_no_batch(device: Device) -> None:
    stream = read_batches(Squares(), positions_of, batches=12, workers=2, prefetch=1)
    for batch, (tensors, _) in enumerate(stream):
        assert tensors["squares"].tolist() == [position**2 for position in positions_of(batch)]
        assert sum(device.registered.values()) >= 4 * ALIGNMENT
    assert device.waited_for == list(range(8))  # 12 batches in 4 places, none of them copied in time


def test_a_device_in_time_is_never_waited_for(device: Device) -> None:
    device.passed = set(range(100))
    assert sum(1 for _ in read_batches(Squares(), positions_of, batches=12, workers=2, prefetch=1)) == 12
    assert device.waited_for == []


def test_pages_that_cannot_be_locked_cost_a_warning(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.error = 2
    monkeypatch.setattr("torch.zeros", mock.Mock(side_effect=RuntimeError("CUDA error: out of memory")))
    with pytest.warns(UserWarning, match=r"Cannot page-lock .* GB \(CUDA error 2\)"):
        batches = sum(1 for _ in read_batches(Squares(), positions_of, batches=5, workers=1))
    assert batches == 5


def test_without_cuda_nothing_is_locked() -> None:
    with warnings.catch_warnings(), mock.patch("torch.cuda.cudart", side_effect=AssertionError):
        warnings.simplefilter("error")
        ring = ring_of(1)
        ring.lock_pages()
        ring.unlock_pages()


@pytest.mark.gpu
def test_copies_to_a_gpu_run_in_the_background_and_are_whole() -> None:
    torch.zeros(1, device="cuda")
    stream = read_batches(Squares(), positions_of, batches=64, workers=2)
    copies = []
    for tensors, _ in stream:
        assert tensors["squares"].is_pinned()
        torch.cuda._sleep(1_000_000)  # the device lags behind, so that a place given back too early would show
        copies.append(tensors["squares"].to("cuda", non_blocking=True))
    for batch, copy in enumerate(copies):
        assert copy.tolist() == [position**2 for position in positions_of(batch)]
