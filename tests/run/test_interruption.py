"""Signals are remembered and answered, a hang ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from ssl_pipeline.run.interruption import SIGNALS, Interruption, StopAtOnce, Stopped
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


def test_a_start_is_stopped_at_once(usual_ctrl_c):
    with pytest.raises(Stopped, match="signal 15"), StopAtOnce():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), StopAtOnce():
        signal.raise_signal(signal.SIGINT)


def inside_torch(seconds: float) -> None:
    """Ctrl-C and then the end of the launcher, while the main thread runs no Python."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interruption(hang_timeout=0) as interruption:
        interruption.step = 2
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
            time.sleep(seconds)
        assert interruption.requested() == signal.SIGINT


def test_a_signal_is_answered_with_the_step_and_how_to_quit():
    child = start(inside_torch, 0.1)
    assert child.wait() == 0
    assert child.printed().splitlines() == [
        "Ctrl-C: finishing step 2 and saving; Ctrl-C again to quit now",
        f"SIGTERM: still finishing step 2 and saving; kill -INT {child.pid} to quit now",
    ]


def busy(seconds: float) -> None:
    """The main thread is inside one call of torch, which holds no lock on Python; a thread sends the signal."""
    with Interruption(hang_timeout=0):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        matrix = torch.rand(700, 700)
        began = time.monotonic()
        torch.linalg.multi_dot([matrix] * round(150 * seconds))
        print(f"{time.monotonic() - began:.1f} s")


def test_a_signal_is_answered_while_torch_computes():
    child = start(busy, 1.0)
    assert child.wait() == 0
    first, second = child.printed().splitlines()
    assert first == f"SIGUSR1: finishing the step and saving; kill -INT {child.pid} to quit now"
    assert second.endswith(" s"), "the answer came before the end of the call"


def test_what_nohup_switched_off_stays_off():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption(hang_timeout=0) as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.requested() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


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
    assert "Timeout: Nothing has happened for 0.2 s while training" in child.printed()
    assert "in hang" in child.printed()


def test_keepalives_put_the_end_off():
    assert start(wait_with_signs, 1.5, 1.0).wait() == 0


def test_a_timeout_of_zero_waits_for_ever():
    assert start(wait_with_signs, 0.1, 0).wait() == 0


def measure(timeout: float) -> None:
    """Compute for three times the time without a sign, then stand still for as long."""
    with Interruption(hang_timeout=timeout) as interruption:
        with interruption.computing():
            end = time.process_time() + 3 * timeout
            while time.process_time() < end:
                pass
        print("measured", flush=True)
        time.sleep(30)


def test_a_long_computation_of_a_monitor_is_no_hang_and_what_follows_may_be_one():
    child = start(measure, 1.0)
    assert child.wait() == 1
    assert child.printed().startswith("measured")
    assert "Timeout: Nothing has happened for 1 s while training" in child.printed()


def outlive(timeout: float) -> None:
    with Interruption(hang_timeout=timeout):
        pass
    time.sleep(2 * timeout)


def test_nothing_ends_the_process_once_training_is_over():
    assert start(outlive, 0.5).wait() == 0
