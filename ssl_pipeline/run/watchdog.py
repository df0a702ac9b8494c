"""The end of a process that hangs: it says where, notes that it failed, and leaves nothing running."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ssl_pipeline.run.processes import kill_descendants

GRACE = 30.0  # seconds after which a process ends that cannot even run this thread, or write its status
LEAST_CPU = 0.02  # of the time: what a process that works takes, and one that waits does not
LEAST_BYTES = 1_000_000  # read or written; of a file or of a server


class Watchdog:
    """Ends the process with exit code 1 if `seconds` pass without a keepalive; 0 never times out.

    `note` is called first, with a sentence, and its errors are ignored. With `by_activity` a process that computes,
    reads or writes counts as alive: for a start, where the time of the next part is unknown. It may be set, and
    unset, at any time.
    """

    def __init__(self, seconds: float, *, note: Callable[[str], None], by_activity: bool = False) -> None:
        self.seconds, self.note, self.by_activity = seconds, note, by_activity
        self.doing = "starting" if by_activity else "training"
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self.keepalive()
        if self.seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def keepalive(self) -> None:
        """Restart the time until a hang is assumed."""
        self._since = time.monotonic()
        if self.seconds > 0:  # a C thread, for when Python itself hangs
            faulthandler.dump_traceback_later(self.seconds + GRACE, exit=True, file=_output())

    def _watch(self) -> None:
        seen = _activity()
        while not self._ended.wait(min(1.0, self.seconds / 10)):
            if self.by_activity:
                now = _activity()
                if now[0] - seen[0] >= LEAST_CPU * self.seconds or now[1] - seen[1] >= LEAST_BYTES:
                    seen = now
                    self.keepalive()
            if time.monotonic() - self._since >= self.seconds:
                self._end()

    def _end(self) -> None:
        reason = f"Nothing has happened for {self.seconds:g} s while {self.doing} (train.hang_timeout)"
        print(f"Timeout: {reason}. Each thread is here:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True, file=_output())
        with suppress(Exception):
            self.note(f"{reason}; the output shows where each thread was.")
        kill_descendants()
        os._exit(1)


def _output() -> int:
    """A descriptor for the stacks of threads: of stderr, in a notebook of the process's first one."""
    for stream in (sys.stderr, sys.__stderr__):
        with suppress(AttributeError, OSError, ValueError):  # none, without a descriptor, or closed
            return stream.fileno()  # type: ignore[union-attr]
    return 2


def _activity() -> tuple[float, int]:
    """Seconds of CPU time of this process, and bytes that it has read and written."""
    transferred = 0
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()
        transferred = sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    return time.process_time(), transferred
