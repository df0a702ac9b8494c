"""The torture in short: each part with a few trials, and that it notices a promise that is broken."""

from __future__ import annotations

import random
from unittest import mock

import pytest

from tests.torture import inputs, kills, mutations
from tests.torture.faults import torture_faults
from tests.torture.inputs import Case, torture_inputs
from tests.torture.kills import torture_kills
from tests.torture.mutations import Target, mutated, torture_bytes
from tests.torture.outcome import Outcome, table


def test_damaged_bytes_are_read_or_refused_in_one_line(tmp_path):
    outcomes = torture_bytes(tmp_path, cases=12, seed=5)
    assert len(outcomes) >= 12
    assert not [told for outcome in outcomes for told in outcome.broken]


def test_damages_repeat_themselves_and_change_something():
    content = bytes(range(256)) * 8
    first, second = (mutated(content, random.Random("1 x 7")) for _ in range(2))
    assert first == second
    changed = [mutated(content, random.Random(f"1 x {number}")) != content for number in range(50)]
    assert sum(changed) >= 48


def test_a_reader_that_breaks_is_noticed(tmp_path):
    def read(content: bytes) -> None:
        assert len(content) == 64, "an error of its own"

    with mock.patch.object(mutations, "targets", return_value={"toy": Target(b"x" * 64, read)}):
        (outcome,) = torture_bytes(tmp_path, cases=30, seed=0)
    assert 0 < len(outcome.broken) < 30
    assert "AssertionError: an error of its own" in outcome.broken[0]


def test_the_table_counts_and_names_what_broke():
    outcome = Outcome("kills", "ends")
    outcome.count(None)
    outcome.count("run 1 of seed 0: another end")
    lines = table([outcome]).splitlines()
    assert lines[2].split() == ["kills", "2", "1", "ends"]
    assert lines[-1] == "kills: run 1 of seed 0: another end"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_runs_end_as_one_that_was_left_alone(tmp_path, world_size):
    assert not torture_kills(tmp_path, kills=3, seed=11, world_size=world_size).broken


@pytest.mark.slow
def test_a_run_that_ends_otherwise_is_noticed(tmp_path):
    difference = "the exported backbone is another one"
    with mock.patch.object(kills, "_difference", return_value=difference):
        assert torture_kills(tmp_path, kills=1, seed=0).broken == [f"run 0 of seed 0: {difference}"]


@pytest.mark.slow
def test_faults_are_survived_or_told(tmp_path):
    assert not [told for outcome in torture_faults(tmp_path, rounds=1, seed=4) for told in outcome.broken]


@pytest.mark.slow
def test_wrong_inputs_are_refused_in_one_sentence(tmp_path):
    assert not [told for outcome in torture_inputs(tmp_path) for told in outcome.broken]


@pytest.mark.ddp
def test_a_wrong_refusal_is_noticed(tmp_path):
    cases = [
        Case("make_shards", ("source={empty}", "output={output}"), "other words"),
        Case("make_shards", ("source=digits", "split=test", "output={output}"), "no error at all"),
    ]
    with mock.patch.object(inputs, "CHAPTERS", {"toy": cases}):
        (outcome,) = torture_inputs(tmp_path)
    assert len(outcome.broken) == 2
    assert "has no image file" in outcome.broken[0]
    assert "exit code 0 and no error" in outcome.broken[1]
