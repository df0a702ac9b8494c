"""Slots in shared memory: where they lie, and when a slot is free again."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.workers.pool import read_batches
from ssl_pipeline.data.workers.ring import ALIGNMENT, Layout, Slots
from tests.data.workers.test_pool import Squares, positions_of

LAYOUT: Layout = {"crops": ((2, 3, 5), torch.uint8), "labels": ((3,), torch.int64), "empty": ((0, 4), torch.float32)}


def test_a_slot_has_the_tensors_of_the_layout_and_shares_them_with_none() -> None:
    slots = Slots(LAYOUT, 3)
    for number, tensors in enumerate(slots.tensors):
        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == dict(LAYOUT)
        for tensor in tensors.values():
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % ALIGNMENT == 0 or tensor.numel() == 0
            tensor.fill_(number + 1)
    for number, tensors in enumerate(slots.tensors):
        assert all(tensor.eq(number + 1).all() for tensor in tensors.values())


def test_what_a_fork_writes_is_seen_here() -> None:
    slots = Slots(LAYOUT, 2)
    fork = os.fork()
    if fork == 0:
        slots.tensors[1]["labels"].fill_(7)
        os._exit(0)
    os.waitpid(fork, 0)
    assert slots.tensors[1]["labels"].tolist() == [7, 7, 7]
    assert slots.tensors[0]["labels"].tolist() == [0, 0, 0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_memory_has_no_name_and_goes_with_its_last_view() -> None:
    def mappings() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        starts_and_ends = [[int(place, 16) for place in line.split()[0].split("-")] for line in lines]
        return [line for line, (start, end) in zip(lines, starts_and_ends, strict=True) if start <= address < end]

    slots = Slots({"block": ((3 << 20,), torch.uint8)}, 2)
    view, address = slots.tensors[1]["block"], slots.block.data_ptr()
    (line,) = mappings()
    assert line.endswith("/dev/zero (deleted)")
    assert line.split()[1] == "rw-s"
    del slots
    assert view.sum() == 0
    del view
    assert mappings() == []


def test_slots_are_taken_and_given_back() -> None:
    slots = Slots(LAYOUT, 2)
    taken = {slots.take(wait=False), slots.take(wait=True)}
    assert taken == {0, 1}
    assert slots.take(wait=False) is slots.take(wait=True) is None
    slots.give_back(1)
    assert slots.take(wait=False) == 1


def test_too_much_memory_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"Cannot reserve 2e\+09 GB for 2 batches: .*fewer data\.workers"):
        Slots({"block": ((10**18,), torch.uint8)}, 2)


class Device:
    """What Slots asks of CUDA; the events of `passed` have been reached."""

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


def test_a_slot_is_free_once_the_device_has_its_copy(device: Device) -> None:
    slots = Slots(LAYOUT, 3)
    first, second, third = (slots.take(wait=False) for _ in range(3))
    slots.give_back(first)
    slots.give_back(second)
    assert slots.take(wait=False) is None
    device.passed = {0}
    assert slots.take(wait=False) == first
    assert slots.take(wait=False) is None
    assert device.waited_for == []  # the host has not waited so far
    assert slots.take(wait=True) == second
    assert device.waited_for == [1]
    slots.give_back(third)
    slots.give_back(first)
    assert slots.take(wait=True) == third  # the oldest, and no more than one
    assert device.waited_for == [1, 2]


def test_a_device_far_behind_costs_waiting_but_no_batch(device: Device) -> None:
    stream = read_batches(Squares(), positions_of, batches=12, workers=2, prefetch=1)
    for batch, (tensors, _) in enumerate(stream):
        assert tensors["squares"].tolist() == [position**2 for position in positions_of(batch)]
        assert sum(device.registered.values()) >= 4 * ALIGNMENT
    assert device.waited_for == list(range(8))  # 12 batches in 4 slots, none of them copied in time


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
        slots = Slots(LAYOUT, 1)
        slots.lock_pages()
        slots.unlock_pages()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_to_a_gpu_run_in_the_background_and_are_whole() -> None:
    torch.zeros(1, device="cuda")
    stream = read_batches(Squares(), positions_of, batches=64, workers=2)
    copies = []
    for tensors, _ in stream:
        assert tensors["squares"].is_pinned()
        torch.cuda._sleep(1_000_000)  # the device lags behind, so that a slot given back too early would show
        copies.append(tensors["squares"].to("cuda", non_blocking=True))
    for batch, copy in enumerate(copies):
        assert copy.tolist() == [position**2 for position in positions_of(batch)]
