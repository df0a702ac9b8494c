"""The doctor during a run: looks at the rows now and then, says each finding once and keeps them in doctor.json."""

from __future__ import annotations

from collections.abc import Callable

from ssl_pipeline.config import failure_sentence, printable
from ssl_pipeline.run.doctor import Finding, Row, diagnose
from ssl_pipeline.run.doctor.records import read_findings, read_recipe_of, read_rows, write_findings
from ssl_pipeline.training.run import Run

CHECKUPS = 100  # of a run, evenly
MOST_ROWS = 4000  # kept in memory; a checkup then takes some 20 ms
SAID_BY_OTHERS = {"below_the_start", "waits_for_data", "run_ends_in_warmup"}
"""The monitors, the loader's watch and the start of the run say these themselves."""


class Checkups:
    """The doctor's checkups of a run, on its first process; one that fails costs a line in the log."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._path, self._say = run.output.path, say
        self._is_on = run.output.directory is not None
        self._every = max(1, run.clock.total_steps // CHECKUPS)
        self._next = 0
        self._rows: list[Row] = []
        self._found: dict[str, Finding] = {}
        if not self._is_on:
            return
        self._settings = run.output.plain_settings() or {}
        self._recipe = read_recipe_of(self._settings)
        self._rows = [*read_rows(self._path)]  # of a resumed run
        reached = int(str(self._rows[-1]["step"])) if self._rows else -1
        self._found = {finding.rule: finding for finding in read_findings(self._path) if finding.step <= reached}

    def see(self, row: Row, *, is_last: bool) -> None:
        """Take in a logged row, and look at all of them if it is time."""
        if not self._is_on:
            return
        self._rows.append(row)
        step = int(str(row["step"]))
        if step < self._next and not is_last:
            return
        self._next = step + self._every
        try:
            self._look()
        except Exception as error:  # a failing checkup must not end the run
            self._is_on = False
            self._say(f"The doctor is skipped from step {step} on: {printable(failure_sentence(error))}")

    def _look(self) -> None:
        self._rows = thinned(self._rows)
        found = {finding.rule: finding for finding in diagnose(self._rows, self._settings, self._recipe)}
        for rule, finding in found.items():
            if rule not in self._found and rule not in SAID_BY_OTHERS:
                self._say(f"{finding} (settings: {', '.join(finding.settings)})")
        self._found |= {rule: finding for rule, finding in found.items() if rule not in self._found}
        write_findings(self._path, list(self._found.values()))


def thinned(rows: list[Row]) -> list[Row]:
    """At most MOST_ROWS rows: of the older half every other one goes, those of monitors aside."""
    while len(rows) > MOST_ROWS:
        half = len(rows) // 2
        old = [row for place, row in enumerate(rows[:half]) if place % 2 == 0 or "knn_top1" in row or "rankme" in row]
        if len(old) == half:
            return rows
        rows = old + rows[half:]
    return rows
