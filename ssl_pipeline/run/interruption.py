"""Ending a run cleanly: signals, a step that hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

from ssl_pipeline.config import launched_rank
from ssl_pipeline.run.watchdog import Watchdog

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS_BETWEEN_PRESSES = 1.0


class Stopped(BaseException):
    """A signal, where there is no step to finish; no `except Exception` on the way may keep it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.signal_number = signal_number


class StopAtOnce:
    """Raises Stopped at a signal (KeyboardInterrupt at Ctrl-C, as usual): for a start, which leaves nothing to save."""

    def __enter__(self) -> StopAtOnce:
        self._previous = _handle(_stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore(self._previous)


class Interruption:
    """Remembers a request to stop, so that the run can finish its step, save and leave.

    A launcher may pass on a signal that its whole process group got already, so repeated signals change nothing, except
    Ctrl-C: pressed again, a second or more after the first, it acts as usual. Each is answered at once, also while the
    main thread is inside torch. After `hang_timeout` seconds without a keepalive the watchdog ends the process.

    note_hang: what is done first then, with a sentence. step: the one that will be finished, for the answer.
    """

    def __init__(self, *, hang_timeout: float) -> None:
        self.signal_number = 0
        self.note_hang: Callable[[str], None] = lambda reason: None
        self.step: int | None = None
        self._since = 0.0
        self._watchdog = Watchdog(hang_timeout, note=lambda reason: self.note_hang(reason))

    def __enter__(self) -> Interruption:
        self._previous = _handle(self._remember)
        self._answers = _Answers(self._answer) if launched_rank() == "0" else None
        self._watchdog.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._answers is not None:
            self._answers.close()
        _restore(self._previous)
        self._watchdog.__exit__(kind, error, trace)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        again = time.monotonic() - self._since >= SECONDS_BETWEEN_PRESSES
        if number == signal.SIGINT and self.signal_number and again:
            signal.signal(number, self._previous[signal.SIGINT])
            signal.raise_signal(number)
        elif not self.signal_number:
            self.signal_number, self._since = number, time.monotonic()

    def _answer(self, number: int, earlier: list[int]) -> str:
        """What is printed for a signal, after others."""
        what = f"finishing step {self.step} and saving" if self.step is not None else "finishing the step and saving"
        if number == signal.SIGINT:
            return f"Ctrl-C: {what}; Ctrl-C again to quit now"
        # without its launcher this process has no terminal, so Ctrl-C no longer reaches it
        still = "still " if earlier else ""
        return f"{signal.Signals(number).name}: {still}{what}; kill -INT {os.getpid()} to quit now"

    def requested(self) -> int:
        """The number of the signal that asks this process to stop, 0 if none."""
        return self.signal_number

    def keepalive(self) -> None:
        """Restart the time until a hang is assumed."""
        self._watchdog.keepalive()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, this process is alive as long as it computes, reads or writes: for what sends no keepalives itself,
        such as a monitor that searches among all features, or fits a classifier."""
        self._watchdog.by_activity = True
        try:
            yield
        finally:
            self._watchdog.by_activity = False
            self.keepalive()


class _Answers:
    """A thread that prints a line on each kind of signal as it comes: the main thread may be inside torch for long."""

    def __init__(self, answer: Callable[[int, list[int]], str]) -> None:
        self._answer = answer
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._previous = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._print, name="answers", daemon=True)
        self._thread.start()

    def _print(self) -> None:
        earlier: list[int] = []
        while (number := os.read(self._reading, 1)) not in (b"\0", b""):
            if number[0] in SIGNALS and number[0] not in earlier:
                text = self._answer(number[0], earlier)
                earlier.append(number[0])
                start = "\n" if sys.stderr.isatty() else ""  # not behind a progress bar
                os.write(2, f"{start}{text}\n".encode())

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous)
        os.write(self._writing, b"\0")
        self._thread.join()
        os.close(self._reading)
        os.close(self._writing)


Handler = Callable[[int, FrameType | None], object] | int | None


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


def _handle(handler: Handler) -> dict[signal.Signals, Handler]:
    """Handle the signals, and return who handled them before; what nohup has disabled stays disabled."""
    handled = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


def _restore(previous: dict[signal.Signals, Handler]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
