"""Signals are remembered, a lost launcher is noticed, a hang ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from ssl_pipeline.run.interruption import SIGNALS, Interruption
from tests.ranks import start


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_remembered_and_the_handlers_come_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with Interruption(hang_timeout=0) as interruption:
        assert interruption.requested() == 0
        signal.raise_signal(number)
        assert interruption.requested() == number
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_that_a_launcher_passes_on_changes_nothing(number):
    with Interruption(hang_timeout=0) as interruption:
        signal.raise_signal(number)
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested() == number, "the first one counts"


@pytest.fixture
def usual_ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, which a shell changes for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_pressed_again_after_a_while_interrupts_at_once(monkeypatch, usual_ctrl_c):
    with Interruption(hang_timeout=0) as interruption:
        signal.raise_signal(signal.SIGINT)
        later = time.monotonic() + 1.5
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interruption.requested() == signal.SIGINT


def test_the_end_of_the_launcher_is_a_request_to_stop(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with Interruption(hang_timeout=0) as interruption:
        assert interruption.requested() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert interruption.requested() == signal.SIGTERM


def test_without_a_launcher_a_new_parent_means_nothing(monkeypatch):
    monkeypatch.delitem(os.environ, "WORLD_SIZE", raising=False)
    with Interruption(hang_timeout=0) as interruption:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert interruption.requested() == 0


def wait_with_signs(seconds: float, timeout: float) -> None:
    with Interruption(hang_timeout=timeout) as interruption:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
            if timeout < seconds:
                interruption.keepalive()


def hang(timeout: float) -> None:
    with Interruption(hang_timeout=timeout):
        time.sleep(30)


def test_a_hang_ends_the_process_with_its_stacks():
    child = start(hang, 0.2)
    assert child.wait() == 1
    assert "Timeout" in child.printed()
    assert "in hang" in child.printed()


def test_keepalives_put_the_end_off():
    assert start(wait_with_signs, 1.5, 1.0).wait() == 0


def test_a_timeout_of_zero_waits_for_ever():
    assert start(wait_with_signs, 0.1, 0).wait() == 0


def outlive(timeout: float) -> None:
    with Interruption(hang_timeout=timeout):
        pass
    time.sleep(2 * timeout)


def test_nothing_ends_the_process_once_training_is_over():
    assert start(outlive, 0.5).wait() == 0
