"""A run's directory: one run at a time, its file names, and what an operator reads about its state."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from ssl_pipeline.config import ConfigError, failure_sentence, printable
from ssl_pipeline.files import JSON, lock, open_no_link, write_json, write_text

SECONDS_BETWEEN_HEARTBEATS = 5.0
MOST_TRIES = 100  # to make a directory that another start may remove meanwhile
TRACES = ("config.yaml", "metrics.jsonl", "backbone.safetensors")  # of a run that has begun

State = Literal["running", "done", "preempted", "failed"]


@dataclass(frozen=True)
class Status:
    """What a run last said about itself; `time` is UTC in ISO 8601.

    checkpoint: the step of its newest checkpoint, 0 if it had none yet; None where an earlier version wrote the file.
    """

    state: State
    step: int
    reason: str
    time: str
    checkpoint: int | None = None


class RunDirectory:
    """Holds one run's output directory for as long as the object lives, so that no second run writes into it.

    The lock is POSIX's (fcntl), not flock's: forked data workers do not inherit it, so a trainer killed with SIGKILL
    frees the directory at once, while its orphaned workers still live for some seconds. Such a lock belongs to the
    process: opening and closing `.lock` in the same process releases it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._lock = self._take()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        self._last_heartbeat = -SECONDS_BETWEEN_HEARTBEATS
        self.checkpoint = 0

    def _take(self) -> int:
        """The descriptor of the lock; the directory is made again if another start, refused, removes it meanwhile."""
        for _ in range(MOST_TRIES):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                descriptor = open_no_link(self.path / ".lock", os.O_RDWR | os.O_CREAT)
            except (FileExistsError, NotADirectoryError):
                raise ConfigError(f"output={self.path} must be a directory. It is, or lies under, a file.") from None
            except FileNotFoundError:
                continue
            if not lock(descriptor, wait=False, inherited=False):
                holder = _written_in(descriptor)
                os.close(descriptor)
                raise ConfigError(
                    f"{self.path} is in use by another run ({holder or 'it is just starting'}). "
                    "Stop it or choose another output=DIR."
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), (self.path / ".lock").stat()):
                    return descriptor
            os.close(descriptor)
        raise ConfigError(f"output={self.path} cannot be made: its file system has no place for it. Choose another.")

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with suppress(OSError, ConfigError):  # a full disk, a damaged file: the error itself counts
                self._note_end(error)
            self._remove_if_empty()
        os.close(self._lock)

    def _remove_if_empty(self) -> None:
        """A start that made the directory and left nothing in it removes it again, and the folders made for it."""
        with suppress(OSError):
            if self._made and [path.name for path in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                for folder in self._made:
                    folder.rmdir()

    def _note_end(self, error: BaseException) -> None:
        """A start that ends before training: the directory does not say "running", be it of one that was killed.

        A refused start leaves a directory as it is, and no start makes a complete run another.
        """
        before = read_status(self.path)
        if isinstance(error, ConfigError) or (before is not None and before.state != "running"):
            return
        state: State = "failed" if isinstance(error, Exception) else "preempted"
        self._end(state, printable(failure_sentence(error)))

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    def write_config(self, yaml_text: str) -> None:
        write_text(self.config_path, yaml_text)

    def status(self, state: State, *, step: int, reason: str = "") -> None:
        """Write `status.json`: read by an operator or by the script that restarts the run."""
        self._write_status(Status(state, step, reason, _utc_now(), self.checkpoint))

    def fail(self, reason: str) -> None:
        """Write that the run has failed, at the step that it last reported."""
        self._end("failed", reason)

    def _end(self, state: State, reason: str) -> None:
        """Write how a start ended that did not train: the run's position is unchanged."""
        before = read_status(self.path) or Status(state, 0, reason, "", None if self.config_path.exists() else 0)
        self._write_status(replace(before, state=state, reason=reason, time=_utc_now()))

    def _write_status(self, status: Status) -> None:
        facts = asdict(status)
        if status.checkpoint is None:
            del facts["checkpoint"]
        write_json(self.path / "status.json", facts)

    def refuse_lost_checkpoints(self) -> None:
        """Raises ConfigError if a run has been here whose checkpoints are gone: it would start over from zero.

        A run that was stopped before its first checkpoint has lost nothing else; it may.
        """
        if any((self.path / "checkpoints").glob("step-*")):
            return
        traces = [name for name in TRACES if (self.path / name).is_file() and (self.path / name).stat().st_size]
        status = read_status(self.path)
        saved_nothing = status is not None and status.checkpoint == 0 and status.state != "done"
        if traces and not saved_nothing:
            raise ConfigError(
                f"{self.path} has {' and '.join(traces)} of a run, but no checkpoint to go on from, and a run never "
                "starts over from zero over another. Put its checkpoints/ back, choose another output=DIR, or remove "
                "that directory."
            )

    def note_start(self, start: Mapping[str, JSON]) -> None:
        """Append what is known of this start to `run.json`; nothing depends on it."""
        path = self.path / "run.json"
        starts: list[JSON] = []
        with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or not ours
            starts = list(json.loads(path.read_text(encoding="utf-8"))["starts"])
        write_json(path, {"starts": [*starts, {"time": _utc_now(), **start}]})

    def heartbeat(self, *, step: int) -> None:
        """Write `heartbeat.json` if the last one is a few seconds old; call it in every step."""
        now = time.monotonic()
        if now - self._last_heartbeat < SECONDS_BETWEEN_HEARTBEATS:
            return
        self._last_heartbeat = now
        beat: JSON = {"time": _utc_now(), "step": step, "pid": os.getpid()}
        write_json(self.path / "heartbeat.json", beat, durable=False)


def holder_of(run: Path) -> str | None:
    """Which other process holds a run's directory, as `pid 12 on node3`; None if none does.

    It takes the lock for a moment. A process that holds the directory itself must not ask: it would free it.
    """
    with suppress(OSError):  # no run has been here, or there are no locks
        descriptor = open_no_link(run / ".lock", os.O_RDONLY)
        try:
            if not lock(descriptor, shared=True, wait=False, inherited=False):
                return _written_in(descriptor) or "just starting"
        finally:
            os.close(descriptor)
    return None


def _written_in(lock_file: int) -> str:
    """What the process that holds a lock has written in it, nothing while it starts."""
    return os.pread(lock_file, 100, 0).decode(errors="replace").strip()


def require_directory(run: Path) -> None:
    """Raise ConfigError for what is not a directory."""
    if not run.is_dir():
        raise ConfigError(f"run={run} must be the directory of a run. There is no such directory.")


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
