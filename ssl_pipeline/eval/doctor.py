"""What is wrong with a run: the rules of `run/doctor`, applied to what it has logged."""

from __future__ import annotations

from pathlib import Path

from ssl_pipeline.config import Config, printable, run_command
from ssl_pipeline.run.directory import read_status
from ssl_pipeline.run.doctor.records import examine


class DoctorConfig(Config):
    """Look at the metrics of a run, finished or not, for common problems: losses no better than guessing,
    collapse, gradients that explode, settings that do not suit the run.
    """

    positional = "run"

    run: Path
    """The run's directory."""


def main(config: DoctorConfig) -> None:
    findings = examine(config.run)
    status = read_status(config.run)
    if status is not None and status.state == "failed":
        print(printable(f"The run failed at step {status.step}: {status.reason}"))
    if not findings:
        print(printable(f"{config.run}: nothing found."))
    for finding in findings:
        print(printable(f"Step {finding.step}: {finding.seen}"))
        print(printable(f"    {finding.helps}"))
        print(printable(f"    settings: {', '.join(finding.settings)}   rule: {finding.rule}"))


def command(name: str = "python -m eval.doctor") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(DoctorConfig, main, command=name)
