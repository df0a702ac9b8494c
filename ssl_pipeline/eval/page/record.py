"""What a run has left in its directory, as far as its page shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssl_pipeline.config import ConfigError, Tree
from ssl_pipeline.eval.page.metrics import Series, read_series
from ssl_pipeline.eval.results import Report, read_reports
from ssl_pipeline.run.directory import Status, read_status, require_directory
from ssl_pipeline.run.doctor import Finding, Row
from ssl_pipeline.run.doctor.case import Case, schedule_of
from ssl_pipeline.run.doctor.records import examine, read_rows, settings_of

SCHEDULE_POINTS = 80


@dataclass(frozen=True)
class Record:
    """A run: where it is, what it logged, what evaluators found, how it was set, what the doctor sees.

    planned: schedules of the settings that change during the run and are not logged, as series.
    """

    path: Path
    name: str
    series: list[Series]
    planned: list[Series]
    reports: dict[str, Report]
    text: str
    settings: Tree
    findings: list[Finding]
    status: Status | None

    def setting(self, section: str, key: str) -> object:
        found = self.settings.get(section)
        return found.get(key) if isinstance(found, dict) else None


def read_record(run: Path) -> Record:
    """All of a run, which may still be training. Raises ConfigError for a directory in which nothing ran."""
    require_directory(run)
    series, reports = read_series(run), read_reports(run, picked=True)
    if not series and not reports:
        raise ConfigError(f"run={run} has neither metrics.jsonl nor a report in eval/: nothing ran there.")
    text = _config_text(run)
    settings, rows = settings_of(text), read_rows(run)
    return Record(
        path=run,
        name=run.resolve().name,
        series=series,
        planned=planned_series(rows, settings),
        reports=reports,
        text=text,
        settings=settings,
        findings=examine(run) if text and rows else [],
        status=read_status(run),
    )


def told_apart(records: Sequence[Record]) -> list[Record]:
    """Runs by their directories' names, with as much of the path above as is needed to distinguish them."""
    paths = [record.path.resolve() for record in records]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [replace(record, name=name) for record, name in zip(records, names, strict=True)]


def _config_text(run: Path) -> str:
    try:
        return (run / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def planned_series(rows: list[Row], settings: Tree) -> list[Series]:
    """Momenta, temperatures and weights that change by a schedule, as far as the run has come."""
    if not any(isinstance(row["step"], int) and row["step"] > 0 for row in rows):
        return []
    case, found = Case(rows, settings, None), []
    progress = case.progress
    steps = sorted({progress.step * point // SCHEDULE_POINTS for point in range(SCHEDULE_POINTS + 1)})
    for section in ("optim", "method"):
        tree = settings.get(section)
        for key, value in tree.items() if isinstance(tree, dict) else ():
            schedule = schedule_of(value) if isinstance(value, dict) and "value" in value else None
            if schedule is None or (section, key) == ("optim", "lr"):
                continue
            values = [schedule(type(progress)(step, progress.total_steps, progress.steps_per_epoch)) for step in steps]
            if max(values) > min(values):
                found.append(Series(key, steps, values))
    return found
