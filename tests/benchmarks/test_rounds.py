"""The harness: fair rounds, honest ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks import rounds as harness
from benchmarks.report import as_json, as_table, duration, ratios
from benchmarks.rounds import Comparison, Contestant, Sample, count_flops, run_rounds
from benchmarks.start_up import growth_table

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


def taking(clock: Clock, seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[], int]:
    """Work that takes so long and does two items."""

    def work() -> int:
        clock.now += seconds
        if log is not None:
            log.append(name)
        return 2

    return work


def compare(*contestants: Contestant, **settings: object) -> Comparison:
    return Comparison("toy", "items", contestants=list(contestants), **settings)


def test_every_round_begins_with_another_contestant(clock: Clock):
    log: list[str] = []
    comparison = compare(*(Contestant(name, taking(clock, 1.0, log, name)) for name in "abc"))
    run_rounds(comparison, rounds=3, seconds=1000, device=CPU)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"  # a warm-up, then the rounds


def test_all_draw_the_same_numbers_in_a_round():
    drawn: dict[str, list[float]] = {"a": [], "b": []}
    comparison = compare(
        *(Contestant(name, lambda own=own: own.append(torch.rand(1).item())) for name, own in drawn.items())
    )
    comparison.items = 1
    run_rounds(comparison, rounds=2, seconds=1000, device=CPU)
    assert drawn["a"] == drawn["b"]
    assert drawn["a"][1] != drawn["a"][2]


def test_ratios_are_taken_within_a_round():
    slow_machine_in_round_two = [Sample(1, 2.0, 0), Sample(1, 20.0, 0)]
    assert ratios([Sample(1, 1.0, 0), Sample(1, 10.0, 0)], slow_machine_in_round_two) == [2.0, 2.0]


def test_the_report_has_medians_ratios_and_spread(clock: Clock):
    slow, fast = Contestant("slow", taking(clock, 4.0)), Contestant("fast", taking(clock, 1.0), note="a note")
    comparison = compare(slow, fast, references=("slow",), left_out={"absent": "not installed"}, setting="small")
    outcome = run_rounds(comparison, rounds=4, seconds=1000, device=CPU)
    report = as_json(outcome)
    sample = {"items": 2, "seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": None}
    assert report["contestants"]["fast"] == {"note": "a note", "rounds": [sample] * 4, "flops_per_item": None}
    table = as_table(outcome).splitlines()
    assert table[0] == "toy (small)"
    assert table[1].split("  ")[0] == "items"
    assert table[3].split() == ["slow", "0.5", "2", "s", "2", "s", "1.00", "(1.00-1.00)"]
    assert table[4].split() == ["fast", "2", "500", "ms", "500", "ms", "4.00", "(4.00-4.00)"]
    assert table[5] == "left out: absent: not installed"


def test_a_budget_ends_the_rounds_but_leaves_three(clock: Clock):
    comparison = compare(Contestant("a", taking(clock, 1.0)))
    assert len(run_rounds(comparison, rounds=9, seconds=0.1, device=CPU).samples["a"]) == 3
    assert len(run_rounds(comparison, rounds=9, seconds=6.5, device=CPU).samples["a"]) == 5
    assert len(run_rounds(comparison, rounds=2, seconds=0.1, device=CPU).samples["a"]) == 2


def test_short_units_are_repeated(clock: Clock):
    comparison = compare(Contestant("a", taking(clock, 0.1)))
    outcome = run_rounds(comparison, rounds=1, seconds=10, device=CPU, shortest=0.5)
    assert outcome.samples["a"][0].items == 2 * 5


def test_what_a_session_takes_is_not_measured(clock: Clock):
    @contextmanager
    def session() -> Iterator[None]:
        clock.now += 100
        yield
        clock.now += 100

    comparison = compare(Contestant("a", taking(clock, 1.0), session=session))
    assert run_rounds(comparison, rounds=1, seconds=1, device=CPU).samples["a"][0].seconds == 1.0


def test_a_contestant_that_raises_costs_no_other_its_figures(clock: Clock):
    def broken() -> int:
        raise RuntimeError("of another version\nand more")

    comparison = compare(Contestant("broken", broken), Contestant("a", taking(clock, 1.0)))
    outcome = run_rounds(comparison, rounds=2, seconds=10, device=CPU)
    assert outcome.failed == {"broken": "RuntimeError: of another version"}
    assert len(outcome.samples["a"]) == 2
    assert "failed: broken" in as_table(outcome)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    seen = []
    comparison = compare(Contestant("a", lambda: seen.append(torch.get_num_threads())), items=1, threads=1)
    run_rounds(comparison, rounds=1, seconds=1, device=CPU)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_flops_are_those_of_forward_and_backward():
    weight = torch.ones(3, 5, requires_grad=True)
    images = torch.ones(4, 3, requires_grad=True)
    assert count_flops(lambda: (images @ weight).sum().backward()) == 3 * 2 * 4 * 3 * 5


def test_the_share_of_the_peak_is_reported(clock: Clock):
    def product() -> None:
        torch.ones(10, 10) @ torch.ones(10, 10)

    comparison = compare(Contestant("a", taking(clock, 1.0), counted=product), items=2)
    outcome = run_rounds(comparison, rounds=1, seconds=1, device=CPU)
    assert outcome.flops_per_item["a"] == 1000
    assert "25.0%" in as_table(outcome, peak_flops=8000.0)  # 2,000 in the one second of a unit
    assert "MFU" not in as_table(outcome)


@pytest.mark.parametrize(("seconds", "text"), [(1.234, "1.23 s"), (0.0045, "4.5 ms"), (6.78e-4, "678 us")])
def test_durations_have_units(seconds: float, text: str):
    assert duration(seconds) == text


def test_cost_growth_is_a_table():
    start_up = [{"shards": 10, "seconds": 1.5}, {"shards": 100_000, "seconds": 2.0}]
    table = growth_table({"start_up": start_up, "worker_memory": [{"samples": 16_000_000, "own_megabytes": 12.34567}]})
    assert "100,000" in table
    assert "12.35" in table
