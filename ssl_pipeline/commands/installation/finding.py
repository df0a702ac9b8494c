"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """State `wrong` keeps a run from training, `note` costs speed or a feature. advice: what to try, or nothing."""

    state: Literal["ok", "note", "wrong"]
    what: str
    told: str
    advice: str = ""


def reason(error: BaseException) -> str:
    """The first line of a foreign error, cut to what a terminal shows."""
    return next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__
