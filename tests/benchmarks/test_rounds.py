"""The harness: fair rounds, honest ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks import rounds as harness
from benchmarks.report import as_json, as_table, duration, growth_table, ratios, spread
from benchmarks.rounds import Comparison, Contestant, Sample, count_flops, run_rounds

CPU = torch.device("cpu")


class Clock:
    """Stands in for `time`: contestants move it on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(harness, "time", clock)
    return clock


def taking(clock: Clock, seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[int], int]:
    def unit(number: int) -> int:
        clock.now += seconds
        if log is not None:
            log.append(f"{name}{number}")
        return 2

    return unit


def test_every_round_begins_with_another_contestant(clock: Clock):
    log: list[str] = []
    comparison = Comparison("toy", "items", [Contestant(name, taking(clock, 1.0, log, name)) for name in "abc"])
    run_rounds(comparison, rounds=3, seconds=1000, device=CPU)
    assert log == ["a0", "b0", "c0", *("a0", "b0", "c0"), *("b1", "c1", "a1"), *("c2", "a2", "b2")]


def test_ratios_are_taken_within_a_round():
    slow_machine_in_round_two = [Sample(1, 2.0, 0), Sample(1, 20.0, 0)]
    assert ratios([Sample(1, 1.0, 0), Sample(1, 10.0, 0)], slow_machine_in_round_two) == [2.0, 2.0]


def test_the_report_has_medians_ratios_and_spread(clock: Clock):
    slow, fast = Contestant("slow", taking(clock, 4.0)), Contestant("fast", taking(clock, 1.0), note="a note")
    comparison = Comparison("toy", "items", [slow, fast], ("slow",), {"absent": "not installed"}, setting="small")
    report = as_json(run_rounds(comparison, rounds=4, seconds=1000, device=CPU), peak_flops=None)
    assert report["contestants"]["fast"]["items_per_second"] == 2.0
    assert report["contestants"]["fast"]["times_as_fast_as"]["slow"] == {
        "median": 4.0, "min": 4.0, "max": 4.0, "q1": 4.0, "q3": 4.0
    }  # fmt: skip
    assert report["contestants"]["fast"]["note"] == "a note"
    assert report["contestants"]["slow"]["cpu_seconds_per_item"] == 2.0
    table = as_table(report)
    assert "4.00 (4.00-4.00)" in table
    assert "left out: absent: not installed" in table


def test_a_budget_ends_the_rounds_but_leaves_three(clock: Clock):
    comparison = Comparison("toy", "items", [Contestant("a", taking(clock, 1.0))])
    assert len(run_rounds(comparison, rounds=9, seconds=0.1, device=CPU).samples["a"]) == 3
    assert len(run_rounds(comparison, rounds=9, seconds=6.5, device=CPU).samples["a"]) == 5
    assert len(run_rounds(comparison, rounds=2, seconds=0.1, device=CPU).samples["a"]) == 2


def test_short_units_are_repeated(clock: Clock):
    comparison = Comparison("toy", "items", [Contestant("a", taking(clock, 0.1))])
    outcome = run_rounds(comparison, rounds=1, seconds=10, device=CPU, shortest=0.5)
    assert outcome.samples["a"][0].items == 2 * 5


def test_what_a_session_takes_is_not_measured(clock: Clock):
    @contextmanager
    def session() -> Iterator[None]:
        clock.now += 100
        yield
        clock.now += 100

    comparison = Comparison("toy", "items", [Contestant("a", taking(clock, 1.0), session=session)])
    assert run_rounds(comparison, rounds=1, seconds=1, device=CPU).samples["a"][0].seconds == 1.0


def test_a_contestant_that_raises_costs_no_other_its_figures(clock: Clock):
    def broken(number: int) -> int:
        raise RuntimeError("of another version\nand more")

    comparison = Comparison("toy", "items", [Contestant("broken", broken), Contestant("a", taking(clock, 1.0))])
    outcome = run_rounds(comparison, rounds=2, seconds=10, device=CPU)
    assert outcome.failed == {"broken": "RuntimeError: of another version"}
    assert len(outcome.samples["a"]) == 2
    assert "failed: broken" in as_table(as_json(outcome, peak_flops=None))


def test_threads_are_given_back():
    before = torch.get_num_threads()
    seen = []
    comparison = Comparison(
        "toy", "items", [Contestant("a", lambda number: seen.append(torch.get_num_threads()) or 1)], threads=1
    )
    run_rounds(comparison, rounds=1, seconds=1, device=CPU)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_flops_are_those_of_forward_and_backward_per_item():
    weight = torch.ones(3, 5, requires_grad=True)
    images = torch.ones(4, 3, requires_grad=True)

    def unit(number: int) -> int:
        (images @ weight).sum().backward()
        return 4

    assert count_flops(unit) == 3 * 2 * 3 * 5


def test_the_share_of_the_peak_is_reported(clock: Clock):
    def product(number: int) -> int:
        torch.ones(10, 10) @ torch.ones(10, 10)
        return 1

    unit = taking(clock, 1.0)
    comparison = Comparison("toy", "items", [Contestant("a", unit, counted=product)])
    report = as_json(run_rounds(comparison, rounds=1, seconds=1, device=CPU), peak_flops=8000.0)
    assert report["contestants"]["a"]["flops_per_item"] == 2000
    assert report["contestants"]["a"]["mfu"] == pytest.approx(2000 * 2 / 8000)  # two items per second
    assert "50.0%" in as_table(report)


def test_spread_of_one_value_is_that_value():
    assert spread([3.0]) == {"median": 3.0, "min": 3.0, "max": 3.0, "q1": 3.0, "q3": 3.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 9.0])["q3"] == 4.0


@pytest.mark.parametrize(("seconds", "text"), [(1.234, "1.23 s"), (0.0045, "4.5 ms"), (6.78e-4, "678 us")])
def test_durations_have_units(seconds: float, text: str):
    assert duration(seconds) == text


def test_cost_growth_is_a_table():
    start_up = [{"shards": 10, "seconds": 1.5}, {"shards": 100_000, "seconds": 2.0}]
    table = growth_table({"start_up": start_up, "worker_memory": [{"samples": 16_000_000, "own_megabytes": 12.34567}]})
    assert "100,000" in table
    assert "12.35" in table
