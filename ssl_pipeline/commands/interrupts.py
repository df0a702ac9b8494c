"""Ctrl-C while a command is imported, which takes seconds with torch: a message instead of a traceback."""

from __future__ import annotations

import sys
from types import TracebackType


def answer_interrupts() -> None:
    """From here on an unhandled Ctrl-C ends this process with the message of `run_command`."""
    sys.excepthook = _told


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
