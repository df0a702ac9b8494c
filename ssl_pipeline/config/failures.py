"""The message for any error: one sentence, without advice from other libraries."""

from __future__ import annotations

import errno
import re
import traceback
from pathlib import Path

from ssl_pipeline.config.base import ConfigError, RunError

ADVICE = {
    errno.EMFILE: "Allow this shell more open files: ulimit -n 65536.",
    errno.ENFILE: "The whole machine has no open files left; close what holds them.",
    errno.ENOSPC: "Free some space and run the same command again.",
    errno.EDQUOT: "Your quota is used up; free some space and run the same command again.",
    errno.EFBIG: "Allow this shell larger files: ulimit -f unlimited.",
    errno.EROFS: "Choose a place that can be written.",
    errno.EACCES: "Choose a place that is yours, or ask its owner.",
}
NO_MEMORY = re.compile(  # of torch's CPU and GPU allocators, CUDA's libraries and the system
    r"out of memory|can't allocate memory|cannot allocate memory|unable to allocate|_ALLOC_FAILED|"
    r"can't start new thread|unable to start watchdog thread",  # of a thread that could not start
    re.IGNORECASE,
)
ASKED = re.compile(r"(?:tried to allocate|unable to allocate) ([\d.]+ ?\w+)", re.IGNORECASE)
FOREIGN_ADVICE = re.compile(r"weights_only|PYTORCH_\w+|please (?:file|report|open)|https?://", re.IGNORECASE)
LONGEST_FOREIGN = 250  # characters of a message that is not ours


def failure_sentence(error: BaseException) -> str:
    """The sentence for a user; for an unexpected error its kind, message and place, for a report."""
    text = str(error) or type(error).__name__
    if isinstance(error, ConfigError | RunError) or not isinstance(error, Exception):
        return text
    if is_out_of_memory(error):
        return f"Out of memory{memory_asked_for(error)}. Lower the batch size, or the number of workers."
    if isinstance(error, OSError):
        told = without_number(error) or text
        return f"{told}. {ADVICE[error.errno]}" if error.errno in ADVICE else told
    told = _own_words(text)
    if not isinstance(error, ValueError):
        told = f"unexpected {type(error).__name__}" + (f": {told}" if str(error) else "")
    frames = traceback.extract_tb(error.__traceback__)
    place = f"from {Path(frames[-1].filename).name}:{frames[-1].lineno}; " if frames else ""
    return f"{told} ({place}--debug shows more)"


def without_number(error: Exception) -> str:
    """The text of an error of the system without its number: `No such file or directory: 'x'`."""
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the machine or of a GPU was refused: libraries have different error classes, or none."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and NO_MEMORY.search(str(error)) is not None


def memory_asked_for(error: BaseException) -> str:
    """` (2.5 GiB were asked for)`, or an empty string where the error does not say."""
    found = ASKED.search(str(error))
    return f" ({found[1]} were asked for)" if found else ""


def _own_words(text: str) -> str:
    """The first line, without sentences that tell users of a library what to do."""
    line = text.strip().partition("\n")[0]
    sentences = re.split(r"(?<=[.!?;]) ", line)
    kept = " ".join(sentence for sentence in sentences if not FOREIGN_ADVICE.search(sentence))
    return kept if len(kept) <= LONGEST_FOREIGN else f"{kept[:LONGEST_FOREIGN]} ..."
