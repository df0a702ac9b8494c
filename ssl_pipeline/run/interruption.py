"""Ending a run in good order: signals, a launcher that died, a step that hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from torch import Tensor, nn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption:
    """Remembers a request to stop, so that the run can finish its step, save and leave.

    A launcher may pass on a signal that its whole process group got already, so repeated signals change nothing, but
    for Ctrl-C: pressed again, a second or more after the first, it acts as usual. With `hang_timeout` seconds and no
    keepalive in between, the process prints where every thread stands and exits.
    """

    def __init__(self, *, hang_timeout: float) -> None:
        self.hang_timeout = hang_timeout
        self.signal_number = 0
        self._since = 0.0
        self._launcher = os.getppid() if "WORLD_SIZE" in os.environ else None

    def __enter__(self) -> Interruption:
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        self.keepalive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == number and time.monotonic() - self._since >= 1:
            signal.signal(number, self._previous[signal.Signals(number)])
            signal.raise_signal(number)
        elif not self.signal_number:
            self.signal_number, self._since = number, time.monotonic()

    def requested(self) -> int:
        """The number of the signal that asks this process to stop, 0 if none; an orphaned process stops too."""
        if not self.signal_number and self._launcher is not None and os.getppid() != self._launcher:
            self.signal_number = signal.SIGTERM
        return self.signal_number

    def keepalive(self) -> None:
        """Start the time until a hang is assumed anew."""
        if self.hang_timeout > 0:
            faulthandler.dump_traceback_later(self.hang_timeout, exit=True)


class WithKeepalive(nn.Module):
    """A backbone that sends a keepalive with each batch: a monitor may well take longer than `hang_timeout`."""

    def __init__(self, backbone: nn.Module, keepalive: Callable[[], None]) -> None:
        super().__init__()
        self.backbone, self.keepalive = backbone, keepalive

    def forward(self, images: Tensor) -> Tensor:
        self.keepalive()
        return self.backbone(images)
