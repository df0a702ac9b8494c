"""Interleaved rounds: every contestant once per round in a rotating order, so that a noisy machine is fair to all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from traceback import format_exception_only

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

MIN_ROUNDS = 3
"""What a median needs; a budget of time cuts off the rounds after these."""
INSTALL = "not installed; pip install -e '.[bench]'"

Work = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work.

    work: does one unit of it.
    note: what it does otherwise than the others, and whether its results were compared.
    counted: the same work for the FLOP counter, where `work` is compiled; None if nothing is to be counted.
    session: entered before a unit and left after it, outside of the measured time.
    warm_ups: units before the first round; what is compiled needs its own.
    """

    name: str
    work: Work
    note: str = ""
    counted: Work | None = None
    session: Callable[[], AbstractContextManager[object]] = nullcontext
    warm_ups: int = 1


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
class Comparison:
    """Contestants at the same work, and their samples, one per round; `references` divide those of the others.

    items: how many a unit is; None where that is what `work` returns. threads: of torch, None for all cores.
    left_out: contestants that could not take part, failed: those that raised, each with the reason.
    """

    name: str
    item: str
    setting: str = ""
    items: int | None = None
    references: tuple[str, ...] = ()
    threads: int | None = None
    contestants: list[Contestant] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    flops_per_item: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, work: Work, note: str = "", *, counted: Work | None = None) -> None:
        """One more contestant, whose row comes last."""
        self.contestants.append(Contestant(name, work, note, counted))

    def has(self, package: str) -> bool:
        """Whether a peer is installed; one that is not is named as left out."""
        if find_spec(package) is None:
            self.left_out[package] = INSTALL
        return package not in self.left_out

    def add_compiled(self, why_not: str, work: Work, note: str = "", *, counted: Work | None = None) -> None:
        """Our work compiled, unless there is a reason why not."""
        if why_not:
            self.left_out["ours, compiled"] = why_not
        else:
            self.contestants.append(Contestant("ours, compiled", work, note, counted, warm_ups=3))


def run_rounds(
    comparison: Comparison, *, rounds: int, seconds: float, device: torch.device, shortest: float = 0.0
) -> Comparison:
    """Warm up, then measure `rounds` rounds; after three of them no round begins that would end past `seconds`.

    Units that take less than `shortest` seconds are repeated within a sample. A contestant that raises while it warms
    up is left out of the rounds, and named in `failed`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(comparison.threads or threads)
    try:
        started = time.perf_counter()
        contestants = list(_warmed_up(comparison, device, shortest))
        for number in range(rounds if contestants else 0):
            elapsed = time.perf_counter() - started
            round_seconds = sum(samples[-1].seconds for samples in comparison.samples.values() if samples)
            if number >= MIN_ROUNDS and elapsed + round_seconds > seconds:
                break
            first = number % len(contestants)
            for contestant, repeats in (*contestants[first:], *contestants[:first]):
                with contestant.session():
                    sample = measure_unit(contestant, comparison.items, number, device, repeats)
                comparison.samples[contestant.name].append(sample)
    finally:
        torch.set_num_threads(threads)
    return comparison


def _warmed_up(comparison: Comparison, device: torch.device, shortest: float) -> Iterator[tuple[Contestant, int]]:
    """The contestants that work, each with how often its unit is repeated in a sample."""
    items = comparison.items
    for contestant in comparison.contestants:
        try:
            for _ in range(contestant.warm_ups):
                with contestant.session():
                    taken = measure_unit(contestant, items, 0, device).seconds
            if contestant.counted is not None and items is not None:
                comparison.flops_per_item[contestant.name] = count_flops(contestant.counted) / items
        except Exception as error:  # a peer of another version must not cost the figures of all others
            comparison.failed[contestant.name] = describe(error)
        else:
            comparison.samples[contestant.name] = []
            yield contestant, max(1, round(shortest / taken))


def describe(error: Exception) -> str:
    """Type and first line of an error."""
    return "".join(format_exception_only(error)).splitlines()[0]


def measure_unit(
    contestant: Contestant, items: int | None, number: int, device: torch.device, repeats: int = 1
) -> Sample:
    """`repeats` units between two moments at which the device is idle; on a GPU its own events tell the time."""

    def work() -> int:
        done = [contestant.work() for _ in range(repeats)]
        return sum(part for part in done if isinstance(part, int)) if items is None else items * repeats

    for seed in (torch.manual_seed, np.random.seed, random.seed):  # the same draws for whoever draws in the same way
        seed(number)
    if device.type != "cuda":
        cpu, wall = time.process_time(), time.perf_counter()
        done = work()
        return Sample(done, time.perf_counter() - wall, time.process_time() - cpu)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cpu = time.process_time()
    begin.record()
    done = work()
    end.record()
    cpu = time.process_time() - cpu  # without the wait below, which spins
    torch.cuda.synchronize(device)
    return Sample(done, begin.elapsed_time(end) / 1000, cpu, torch.cuda.max_memory_allocated(device) - held)


def count_flops(work: Work) -> int:
    """Floating-point operations of the matrix products and convolutions in one unit, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
