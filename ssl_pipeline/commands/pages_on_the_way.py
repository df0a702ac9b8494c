"""The page of a run at its end, and while it trains: another process writes it, which slows training little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from ssl_pipeline.config import printable

WRITER, PAGE = "ssl_pipeline.commands.report", Path("report", "index.html")
NICENESS = 19  # training goes first
IMAGES = 200  # through the backbone: a first look, eval.report takes more
SECONDS_AT_THE_END = 120.0
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PagesOnTheWay:
    """Starts a writer when it is called, unless the previous one is still running. It never stops or delays the run;
    `finish` waits at most SECONDS_AT_THE_END. Failures are reported at the next call or at `finish`.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._writer: subprocess.Popen[bytes] | None = None
        self._told: IO[bytes] | None = None

    def __call__(self) -> None:
        if self._writer is None or self._writer.poll() is not None:
            self._look_back()
            self._start()

    def finish(self, *, is_new: bool) -> Path | None:
        """The page of the run as it ended, written now unless the run was complete before (not is_new) and has one;
        None, after saying why, if it cannot be written."""
        self._look_back()
        self.stop()
        place = self._run / PAGE
        if is_new or not place.is_file():
            print("Writing the page of the run: a few seconds ...", file=sys.stderr, flush=True)
            self._start(threads=None)
            return place if self._is_written() else None
        return place

    def stop(self) -> None:
        """Stop a writer that is still running."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.kill()
            writer.wait()

    def _start(self, *, threads: str | None = "1") -> None:
        settings = [f"run={json.dumps([str(self._run)])}", f"images={IMAGES}", "device=cpu", "tensorboard=true"]
        environment = {key: value for key, value in os.environ.items() if key not in OF_RANKS}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({} if threads is None else {"OMP_NUM_THREADS": threads})
        self._told = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the writer writes
        try:
            self._writer = subprocess.Popen(
                [sys.executable, "-m", WRITER, *settings],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._told,
                start_new_session=True,  # Ctrl-C is for the run
            )
            os.setpriority(os.PRIO_PROCESS, self._writer.pid, NICENESS)
        except OSError as error:
            _skipped(str(error))

    def _is_written(self) -> bool:
        """Wait for the writer; whether it succeeds."""
        if self._writer is None:
            return False
        try:
            self._writer.wait(SECONDS_AT_THE_END)
        except subprocess.TimeoutExpired:
            self.stop()
            _skipped(f"it is not finished after {SECONDS_AT_THE_END:.0f} s")
            return False
        return self._look_back()

    def _look_back(self) -> bool:
        """Whether a writer has finished successfully; a failure is reported."""
        if self._writer is None or self._writer.poll() is None:
            return False
        code, self._writer = self._writer.returncode, None
        if code and self._told is not None:
            self._told.seek(0)
            lines = self._told.read().decode(errors="replace").split("\n")
            _skipped(next((line for line in reversed(lines) if line.strip()), f"exit code {code}"))
        return code == 0


def _skipped(reason: str) -> None:
    print(printable(f"The page of the run is skipped: {reason}"), file=sys.stderr, flush=True)
