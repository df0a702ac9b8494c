"""The only printer of lines with external names: shards, zips, manifests, URLs, exceptions of libraries.

Such a name may hold terminal controls (escape sequences, line ends, marks that turn the direction of writing), and
may be of any length.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Mapping

LONGEST_LINE = 500
KEPT_END = 160  # characters at the end of a line that is too long, where the advice is
GAP = " [...] "
CONTROLS = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # Unicode's categories of invisible control characters


def printable(text: str, *, longest: int | None = LONGEST_LINE, lines: bool = False) -> str:
    """The text with what a terminal obeys escaped (\\x1b): one line, or several with `lines`, of that length."""
    if lines:
        return "\n".join(printable(line, longest=longest) for line in text.split("\n"))
    shown = "".join(_escaped(character) for character in text)
    if longest is None or len(shown) <= longest:
        return shown
    return shown[: longest - KEPT_END - len(GAP)] + GAP + shown[-KEPT_END:]


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes were launched together, according to the launcher; 1 if it does not say."""
    size = environment.get("WORLD_SIZE", "1").strip()
    return max(int(size), 1) if size.isdecimal() else 1


def launched_rank(environment: Mapping[str, str] = os.environ) -> str:
    """The number of this process among those that were launched together, as text; a RANK that is left over in a shell
    says nothing."""
    return environment.get("RANK", "0") if launched_processes(environment) > 1 else "0"


def note(text: str) -> None:
    """One line on stderr of what the reading of settings changed; of several processes the first says it."""
    if launched_rank() == "0":
        print(printable(f"note: {text}"), file=sys.stderr, flush=True)


def bar_interval() -> float:
    """Seconds between two states of a progress bar on stderr: a terminal shows one in place of the other, a file keeps
    them all.
    """
    return 0.1 if sys.stderr.isatty() else 30.0


def _escaped(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) not in CONTROLS:
        return character
    return character.encode("unicode_escape").decode("ascii")
