"""Ctrl-C while a command is imported, which takes seconds with torch: a word in place of a traceback."""

from __future__ import annotations

import sys
from types import TracebackType


def answer_interrupts() -> None:
    """From here on a Ctrl-C that nobody takes ends this process with the word that `run_command` has for it."""
    sys.excepthook = _told


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
