"""The program that started this process (accelerate, torchrun, srun): its end is a request to stop.

A launcher that is killed leaves its trainers running below pid 1, where nobody notices them. Needs no torch, so that it
is watched while torch is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.run.processes import began, parent_of

SECONDS_BETWEEN_LOOKS = 0.25
LONGEST_WAIT = 2.0  # seconds for the launcher's own last lines
PROGRAMS = {"accelerate", "accelerate-launch", "torchrun", "deepspeed", "srun", "slurmstepd", "mpirun", "mpiexec"}
MODULES = ("accelerate.", "torch.distributed.", "deepspeed.")
LAUNCHED = "SSL_PIPELINE_LAUNCHED"  # set by those commands of ours that start others
SET_FOR_EVERY_TRAINER = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE", LAUNCHED)  # never set by a person
SET_BY_LAUNCHERS = ("WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", LAUNCHED)
NUM_WORDS = 4  # of a command line that has a launcher's name: python -u -m torch.distributed.run


@dataclass(frozen=True)
class Launcher:
    """A process: its number, and when it began (ticks since boot; numbers are given again)."""

    pid: int
    began: int | None

    def is_alive(self) -> bool:
        if self.began is None:
            return os.getppid() == self.pid
        return began(self.pid) == self.began


ENDED = Launcher(pid=-1, began=None)


def find_launcher(environment: Mapping[str, str]) -> Launcher | None:
    """The nearest ancestor with a launcher's name; else the parent, if the environment has what launchers set.

    One that has ended, where the launcher did so before this process had begun to look and the first process of the
    machine or of the user has taken its place. None for a process of a shell: `nohup python pretrain.py &` goes on
    when the shell ends.
    """
    parent = pid = os.getppid()
    while pid > 0:
        if _is_launcher(pid):
            return Launcher(pid, began(pid))
        pid = parent_of(pid)
    if _takes_orphans(parent) and any(name in environment for name in SET_FOR_EVERY_TRAINER):
        return ENDED
    if parent > 0 and any(name in environment for name in SET_BY_LAUNCHERS):
        return Launcher(parent, began(parent))
    return None


def watch_launcher() -> Launcher | None:
    """Send SIGTERM to this process when its launcher has ended; call it before anything that takes long."""
    launcher = find_launcher(os.environ)
    if launcher is not None:
        threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()
    return launcher


def have_the_last_word(launcher: Launcher, text: str) -> None:
    """Print a line once the launcher has ended, or soon: accelerate answers Ctrl-C with a long traceback."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # that its end sends
    until = time.monotonic() + LONGEST_WAIT
    while launcher.is_alive() and time.monotonic() < until:
        time.sleep(0.05)
    print(text, file=sys.stderr, flush=True)


def _watch(launcher: Launcher) -> None:
    while launcher.is_alive():
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(pid: int) -> bool:
    return any(name in PROGRAMS or name.startswith(MODULES) for name in _names(pid))


def _takes_orphans(pid: int) -> bool:
    """Whether a process is the parent of those that have lost theirs: systemd of a user, or number 1, unless that is a
    Python program, which in a container may be a custom launcher."""
    names = _names(pid)
    return "systemd" in names[:1] or (pid == 1 and not any(name.startswith("python") for name in names))


def _names(pid: int) -> list[str]:
    """The first words of a command line, without the directories before them; empty where it cannot be read."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    words = [*words[0].split()[:1], *words[1:NUM_WORDS]]  # slurmstepd: [123.0]
    return [word.rpartition("/")[2].rstrip(":") for word in words]
