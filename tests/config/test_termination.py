"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from ssl_pipeline.config import Config, run_command
from ssl_pipeline.config.termination import terminated_like_interrupted


class Nothing(Config):
    """No settings."""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_was_begun_is_removed_and_a_word_says_so(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun"

    def run(config: Nothing) -> None:
        begun.touch()
        try:
            signal.raise_signal(number)
        finally:
            begun.unlink()

    assert run_command(Nothing, run, command="", argv=[]) == code
    assert capsys.readouterr().err == "interrupted\n"
    assert not begun.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_of_others_stays() -> None:
    took: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: took.append(number))
    try:
        with terminated_like_interrupted():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert took == [signal.SIGTERM]


def test_a_fork_ends_at_once() -> None:
    with terminated_like_interrupted():
        child = os.fork()
        if not child:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_command_runs_in_another_thread_too() -> None:
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(run_command(Nothing, lambda config: None, command="", argv=[]))
    )
    thread.start()
    thread.join()
    assert codes == [0]
