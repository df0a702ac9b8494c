"""Pretraining in a separate process: started by a comparison, a round of self-training and a trial."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

from ssl_pipeline.config import RunError
from ssl_pipeline.run.launcher import LAUNCHED

START = "ssl_pipeline.commands.start"  # by its name: it imports what imports this

OF_LAUNCHERS = ("ACCELERATE_", "GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")
"""Variables by which a process finds the others of its group, which a separate process must not have."""


def start_pretraining(arguments: Sequence[str], *, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """`pretrain.py` with these arguments, on its own; it stops when this process ends. output: where it prints, if not
    where this process does.
    """
    command = [sys.executable, "-m", START, *arguments]
    alone = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    return subprocess.Popen(command, env=alone | {LAUNCHED: "1"}, stdout=output, stderr=output)


def run_pretraining(arguments: Sequence[str]) -> None:
    """The same, waiting for its end; RunError if it fails."""
    with start_pretraining(arguments) as process:
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code:
        raise RunError(f"pretrain.py {' '.join(arguments)} ended with exit code {code}; see above.")


def with_defaults(arguments: Sequence[str], defaults: Sequence[str]) -> list[str]:
    """`key=value` arguments, and those of the defaults whose keys they do not have."""
    own = set(map(key_of, arguments))
    return [*arguments, *(argument for argument in defaults if key_of(argument) not in own)]


def key_of(argument: str) -> str:
    return argument.partition("=")[0]
