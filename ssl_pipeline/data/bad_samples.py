"""What became of images that could not be decoded, and how many of them a run tolerates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ssl_pipeline.data.errors import DataError
from ssl_pipeline.files import lock, open_no_link


@dataclass(frozen=True)
class BadSample:
    """An image that cannot be decoded, the file that it was made from if that is known, and the sample that took its
    place.
    """

    sample: int
    file: str | None
    shard: str
    key: str
    byte: int
    reason: str
    substitute: int


class BadSampleLog:
    """Appends each bad sample once to `bad_samples.jsonl`, and ends the run when they are too many.

    The file is the only state: it counts across restarts and across the processes of a run that share it.
    """

    def __init__(self, path: Path, *, budget: float, total: int) -> None:
        self.path = path
        self.budget = budget
        self.total = total

    def record(self, bad: Iterable[BadSample]) -> int:
        """Note new bad samples and return how many there are so far; DataError above budget * total."""
        new = {sample.sample: sample for sample in bad}
        if not new:
            return 0
        descriptor = open_no_link(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        with open(descriptor, "r+", encoding="utf-8") as file:  # noqa: PTH123 (a descriptor, opened to append)
            lock(file)
            text = file.read()
            known = _samples_in(text)
            lines = [json.dumps(asdict(sample)) for number, sample in new.items() if number not in known]
            if lines:
                torn = "\n" if text and not text.endswith("\n") else ""
                file.write(torn + "\n".join(lines) + "\n")
        count = len(known | new.keys())
        if count > self.budget * self.total:
            raise DataError(
                f"{count} of {self.total} images cannot be decoded, more than data.bad_sample_budget={self.budget:g} "
                f"allows. They are listed in '{self.path}'."
            )
        return count


def _samples_in(text: str) -> set[int]:
    """The sample ids in the log; a line that a crash tore is left out."""
    samples = set()
    for line in text.splitlines():
        try:
            samples.add(int(json.loads(line)["sample"]))
        except (ValueError, KeyError, TypeError):
            continue
    return samples
