"""A run's directory: one run at a time, its file names, and what an operator reads about its state."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from ssl_pipeline.config import ConfigError, failure_sentence, printable
from ssl_pipeline.files import JSON, lock, open_no_link, write_json, write_text

SECONDS_BETWEEN_HEARTBEATS = 5.0

State = Literal["running", "done", "preempted", "failed"]


@dataclass(frozen=True)
class Status:
    """What a run last said about itself; `time` is UTC in ISO 8601."""

    state: State
    step: int
    reason: str
    time: str


class RunDirectory:
    """Holds one run's output directory for as long as the object lives, so that no second run writes into it.

    The lock is POSIX's (fcntl), not flock's: forked data workers do not inherit it, so a trainer killed
    with SIGKILL sets the directory free at once, while its orphaned workers still live for some seconds.
    Such a lock belongs to the process: whoever opens and closes `.lock` in the same process gives it back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"output={path} must be a directory. It is, or lies under, a file.") from None
        self._lock = open_no_link(path / ".lock", os.O_RDWR | os.O_CREAT)
        if not lock(self._lock, wait=False, inherited=False):
            holder = os.pread(self._lock, 100, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise ConfigError(
                f"{path} is in use by another run ({holder or 'it starts right now'}). "
                "Stop it or choose another output=DIR."
            )
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        self._last_heartbeat = -SECONDS_BETWEEN_HEARTBEATS

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with suppress(OSError, ConfigError):  # a full disk, a damaged file: the error itself counts
                self._note_end(error)
        os.close(self._lock)

    def _note_end(self, error: BaseException) -> None:
        """A start that ends before training: the directory does not say "running", be it of one that was killed.

        A refused start leaves a directory as it is, and no start makes a complete run another.
        """
        before = read_status(self.path)
        if isinstance(error, ConfigError) or (before is not None and before.state != "running"):
            return
        state: State = "failed" if isinstance(error, Exception) else "preempted"
        step = before.step if before is not None else 0
        self.status(state, step=step, reason=printable(failure_sentence(error)))

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    def write_config(self, yaml_text: str) -> None:
        write_text(self.config_path, yaml_text)

    def status(self, state: State, *, step: int, reason: str = "") -> None:
        """Write `status.json`: what an operator, or the script that restarts the run, goes by."""
        write_json(self.path / "status.json", {"state": state, "step": step, "reason": reason, "time": _utc_now()})

    def fail(self, reason: str) -> None:
        """Write that the run has failed, at the step that it last told of."""
        before = read_status(self.path)
        self.status("failed", step=before.step if before is not None else 0, reason=reason)

    def heartbeat(self, *, step: int) -> None:
        """Write `heartbeat.json` if the last one is a few seconds old; call it in every step."""
        now = time.monotonic()
        if now - self._last_heartbeat < SECONDS_BETWEEN_HEARTBEATS:
            return
        self._last_heartbeat = now
        beat: JSON = {"time": _utc_now(), "step": step, "pid": os.getpid()}
        write_json(self.path / "heartbeat.json", beat, durable=False)


def read_status(path: Path) -> Status | None:
    """The status of the run in `path`, None where no run has written one.

    After a SIGKILL it still says "running": compare the age of `heartbeat.json`.
    """
    try:
        return Status(**json.loads((path / "status.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path / 'status.json'} is not a run's status: {error}") from None


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
