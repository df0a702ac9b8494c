"""The phases of a step add up to the step, and cost nothing where they are not measured."""

from __future__ import annotations

import time

import pytest
import torch

from ssl_pipeline.run.step_times import PHASES, StepTimes

CPU = torch.device("cpu")


class Clock:
    """Stands in for time.perf_counter."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def make_step(times: StepTimes, number: int, clock: Clock, *, micro_batches: int = 1) -> None:
    """A step that lasts 1 s in its first phase, 2 s in its second, ..."""
    times.start(number)
    for _ in range(micro_batches):
        for seconds, phase in enumerate(PHASES, start=1):
            with times.phase(phase):
                clock.now += seconds


def test_each_phase_has_its_seconds(clock):
    times = StepTimes(CPU, every=1)
    make_step(times, 1, clock)
    assert times.read() == {}, "the first step of a start says nothing about the others"
    make_step(times, 2, clock)
    assert times.read() == {f"seconds_{phase}": seconds for seconds, phase in enumerate(PHASES, start=1)}
    assert times.read() == {}


def test_micro_batches_add_up(clock):
    times = StepTimes(CPU, every=1)
    make_step(times, 1, clock)
    make_step(times, 2, clock, micro_batches=2)
    assert times.read()["seconds_forward"] == 8


def test_what_lies_between_two_phases_belongs_to_the_second(clock):
    times = StepTimes(CPU, every=1)
    make_step(times, 1, clock)
    times.start(2)
    with times.phase("wait"):
        clock.now += 1
    clock.now += 0.5
    with times.phase("copy"):
        clock.now += 1
    assert times.read()["seconds_copy"] == 1.5


def test_steps_are_measured_when_due_and_averaged(clock):
    times = StepTimes(CPU, every=3)
    for number in range(1, 8):
        make_step(times, number, clock, micro_batches=2 if number == 6 else 1)
    assert times.read()["seconds_wait"] == 1.5, "of steps 3 and 6"
    assert times.summary() == (
        "A step took 42 s on average over 2 measured steps: wait 3.6%, copy 7.1%, augment 10.7%, forward 14.3%, "
        "backward 17.9%, optimizer 21.4%, after step 25.0%."
    )


def test_switched_off_nobody_looks_at_the_clock(clock):
    times = StepTimes(CPU, every=0)
    for number in range(1, 4):
        make_step(times, number, clock)
    assert times.read() == {}
    assert times.summary() == ""
    assert clock.asked == 0


@pytest.mark.gpu
def test_on_a_gpu_its_own_time_counts():
    device = torch.device("cuda")
    times, matrix = StepTimes(device, every=1), torch.randn(4096, 4096, device=device)
    for number in (1, 2):
        times.start(number)
        with times.phase("wait"):
            pass
        with times.phase("forward"):
            for _ in range(20):
                matrix @ matrix
    seconds = times.read()
    assert seconds["seconds_forward"] > 10 * seconds["seconds_wait"]
