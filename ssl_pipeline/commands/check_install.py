"""Whether this installation can train: what is wrong with it, and what to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from ssl_pipeline.commands.installation import devices, host, packages
from ssl_pipeline.commands.installation.finding import Finding
from ssl_pipeline.config import Config, printable, run_command

CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    packages.check_versions,
    packages.check_optional,
    packages.check_decoders,
    devices.check_gpus,
    devices.check_collectives,
    host.check_cores_and_memory,
    host.check_shared_memory,
    host.check_open_files,
    host.check_disk,
)
MARKS: dict[str, str] = {"ok": "ok      ", "note": "note    ", "wrong": "WRONG   "}


class CheckInstallConfig(Config):
    """Look at torch, GPUs, collectives, image decoders, memory, shared memory and disk: what is wrong, what to try.

    Takes a few seconds and leaves no files behind. Exits with 1 if training would fail.
    """

    show: Literal["all", "problems"] = "all"
    """What is listed: everything, or only problems and notes."""


def check_install(config: CheckInstallConfig) -> int:
    """Print a line for each finding and what to try; 1 if anything is wrong."""
    wrong = 0
    for check in CHECKS:
        for finding in check():
            wrong += finding.state == "wrong"
            if config.show == "all" or finding.state != "ok":
                print(printable(f"{MARKS[finding.state]}{finding.what}: {finding.told}"), flush=True)
                if finding.advice:
                    print(printable(f"        {finding.advice}"), flush=True)
    print(f"{wrong} of these must be fixed before training." if wrong else "This installation can train.")
    return 1 if wrong else 0


def command(name: str = "ssl-pipeline check-install") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(CheckInstallConfig, check_install, command=name)
