"""Interleaved rounds: every contestant once per round in a rotating order, so that a noisy machine is fair to all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

MIN_ROUNDS = 3
"""What a median needs; a budget of time cuts off the rounds after these."""


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work.

    unit: does one unit of it, the same for all contestants of one round number, and returns how many items it did.
    session: entered before a unit and left after it, outside of the measured time.
    counted: the same work for the FLOP counter, where `unit` is compiled; None if nothing is to be counted.
    note: what it does otherwise than the others, and whether its results were compared.
    warm_ups: units before the first round; what is compiled needs its own.
    """

    name: str
    unit: Callable[[int], int]
    session: Callable[[], AbstractContextManager[object]] = nullcontext
    counted: Callable[[int], int] | None = None
    note: str = ""
    warm_ups: int = 1


@dataclass(frozen=True)
class Comparison:
    """Contestants at the same work; `references` are those that the others are divided by.

    left_out: contestants that could not take part, each with the reason. threads: of torch, None for all cores.
    """

    name: str
    item: str
    contestants: Sequence[Contestant]
    references: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    setting: str = ""


@dataclass(frozen=True)
class Sample:
    """One unit: wall time and this process's own CPU time in seconds, and what it needed on top of what was held."""

    items: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int | None = None

    @property
    def seconds_per_item(self) -> float:
        return self.seconds / self.items


@dataclass
class Outcome:
    """The samples of a comparison by contestant, one per round."""

    comparison: Comparison
    samples: dict[str, list[Sample]]
    flops_per_item: dict[str, float]
    failed: dict[str, str]


def run_rounds(
    comparison: Comparison, *, rounds: int, seconds: float, device: torch.device, shortest: float = 0.0
) -> Outcome:
    """Warm up, then measure `rounds` rounds; after three of them no round begins that would end past `seconds`.

    Units that take less than `shortest` seconds are repeated within a sample. A contestant that raises while it warms
    up is left out of the rounds, and named in `failed`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(comparison.threads or threads)
    try:
        started = time.perf_counter()
        outcome = Outcome(comparison, {}, {}, {})
        contestants = list(_warmed_up(outcome, device, shortest))
        for number in range(rounds if contestants else 0):
            elapsed = time.perf_counter() - started
            round_seconds = sum(samples[-1].seconds for samples in outcome.samples.values() if samples)
            if number >= MIN_ROUNDS and elapsed + round_seconds > seconds:
                break
            first = number % len(contestants)
            for contestant, repeats in (*contestants[first:], *contestants[:first]):
                with contestant.session():
                    outcome.samples[contestant.name].append(measure_unit(contestant.unit, number, device, repeats))
    finally:
        torch.set_num_threads(threads)
    return outcome


def _warmed_up(outcome: Outcome, device: torch.device, shortest: float) -> Iterator[tuple[Contestant, int]]:
    """The contestants that work, each with how often its unit is repeated in a sample."""
    for contestant in outcome.comparison.contestants:
        try:
            for _ in range(contestant.warm_ups):
                with contestant.session():
                    taken = measure_unit(contestant.unit, 0, device).seconds
            if contestant.counted is not None:
                outcome.flops_per_item[contestant.name] = count_flops(contestant.counted)
        except Exception as error:  # a peer of another version must not cost the figures of all others
            outcome.failed[contestant.name] = describe(error)
            continue
        outcome.samples[contestant.name] = []
        yield contestant, max(1, round(shortest / taken))


def describe(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def measure_unit(unit: Callable[[int], int], number: int, device: torch.device, repeats: int = 1) -> Sample:
    """`repeats` units between two moments at which the device is idle; on a GPU its own events tell the time."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):  # the same draws for whoever draws in the same way
        seed(number)
    if device.type != "cuda":
        cpu, wall = time.process_time(), time.perf_counter()
        items = sum(unit(number) for _ in range(repeats))
        return Sample(items, time.perf_counter() - wall, time.process_time() - cpu)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cpu = time.process_time()
    begin.record()
    items = sum(unit(number) for _ in range(repeats))
    end.record()
    cpu = time.process_time() - cpu  # without the wait below, which spins
    torch.cuda.synchronize(device)
    return Sample(items, begin.elapsed_time(end) / 1000, cpu, torch.cuda.max_memory_allocated(device) - held)


def count_flops(unit: Callable[[int], int]) -> float:
    """Floating-point operations per item of the matrix products and convolutions in one unit, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        items = unit(0)
    return counter.get_total_flops() / items
