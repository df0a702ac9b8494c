"""What a run says while it trains: metrics.jsonl, TensorBoard, a progress line and, on request, W&B."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TextIO

from ssl_pipeline.config import ConfigError, Value, printable, read_yaml
from ssl_pipeline.files import without_nan, write_text

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_NUMBERS = 1.0  # of a terminal; each look at a loss makes the host wait for the device
NUMBERS = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "learning_rate": "learning rate {:.3g}",
    "images_per_second": "{:.0f} images/s",
    "data_wait": "data wait {:.0%}",
}
EVENTS = "events.out.tfevents."
COMPARED = ("loss", "knn_top1", "rankme_percent")
"""Metrics that TensorBoard shows next to the settings."""
FEW_NUMBERS = {"loss": "loss {:.4f}", "images_per_second": "{:.0f} images/s", "data_wait": "wait {:.0%}"}

Row = Mapping[str, float | int | str | None]
Now = Callable[[], Row]


class Sink(Protocol):
    """A place that rows go to."""

    def log(self, row: Row) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Sends each logged row to every place that shows it; on the ranks where `enabled` is false, nowhere.

    A row is a flat mapping with at least "step" (optimizer steps made) and "images" (seen, the position).
    `metrics.jsonl` gets it as one line at once, floats unrounded, NaN and infinity as null. At resume, after
    `first_step` steps and `resumed_position` images, the rows behind that go; of a run that begins again (-1) all go.
    """

    def __init__(
        self,
        directory: Path,
        *,
        total_steps: int,
        first_step: int,
        resumed_position: int,
        wandb: bool = False,
        enabled: bool = True,
    ) -> None:
        self._progress: ProgressBar | ProgressLines | None = None
        self._sinks: list[Sink] = []
        self._last_logged = -1
        if not enabled:
            return
        self._last_logged = cut_back(directory / "metrics.jsonl", position=resumed_position)
        self._sinks.append(MetricsFile(directory / "metrics.jsonl"))
        self._sinks.append(TensorBoard(directory, first_step=self._last_logged + 1))
        if wandb:
            self._sinks.append(WeightsAndBiases(directory))
        progress = ProgressBar if sys.stderr.isatty() else ProgressLines
        self._progress = progress(sys.stderr, total_steps=total_steps, first_step=first_step)
        self._sinks.append(self._progress)

    def is_new(self, row: Row) -> bool:
        """Whether a row of an earlier start is not one of those that were kept."""
        return int(row["step"] or 0) > self._last_logged

    def log(self, row: Row) -> None:
        assert {"step", "images"} <= set(row), sorted(row)
        for sink in self._sinks:
            sink.log(row)

    def advance(self, step: int, now: Now | None = None) -> None:
        """Move the progress display to `step`; cheap enough for every step, logged or not.

        `now` is asked for what is shown of this step next to the last row, only when something is shown.
        """
        if self._progress is not None:
            self._progress.advance(step, now)

    def message(self, text: str) -> None:
        """Print one line for the person who watches, without tearing the progress bar."""
        if self._progress is not None:
            self._progress.message(text)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def cut_back(path: Path, *, position: int) -> int:
    """Drop the rows of `path` behind `position`, and what is not a whole row; returns the last step kept, or -1.

    Rows of ssl-pipeline 0.2.0 have "position" in the place of "images".
    """
    if not path.exists():
        return -1
    kept: list[str] = []
    last_step = -1
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines(keepends=True):
        try:
            row = json.loads(line)
            if row["images" if "images" in row else "position"] <= position and line.endswith("\n"):
                last_step = max(last_step, int(row["step"]))
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    if "".join(kept) != text:
        write_text(path, "".join(kept))
    return last_step


class MetricsFile:
    """One JSON object per line, on disk as soon as it is logged, for those who tail the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, row: Row) -> None:
        self._file.write(json.dumps(without_nan(row), allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars and the settings in an events file of the run directory; what an earlier start logged from `first_step`
    on is hidden.
    """

    def __init__(self, directory: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import, and only rank 0 needs it

        sort_before(int(time.time()), directory)
        self._writer = SummaryWriter(str(directory), purge_step=first_step)
        settings = directory / "config.yaml"
        if settings.is_file():
            self._show_settings(settings.read_text(encoding="utf-8"))

    def _show_settings(self, text: str) -> None:
        """The settings unchanged (TEXT), and as columns next to the last loss and k-NN accuracy (HPARAMS)."""
        from torch.utils.tensorboard.summary import hparams

        tree = read_yaml(text, where="config.yaml")
        self._writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()))
        for summary in hparams(flat_settings(tree), dict.fromkeys(COMPARED, 0.0)):
            file_writer = self._writer.file_writer
            assert file_writer is not None
            file_writer.add_summary(summary)

    def log(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, int(row["step"] or 0))

    def close(self) -> None:
        self._writer.close()


def sort_before(second: int, directory: Path) -> None:
    """Rename events files that would not sort before one that is begun in this `second` (Unix time).

    TensorBoard reads files in the order of their names, and hides only what it has read. A name begins with the second
    of its start, followed by host, process and a counter, none of which says what came first: two starts in one second,
    or a clock that went back, would show the steps that were done again twice. Files of the second before are renamed
    too, since a host's name would sort behind the numbers that stand in its place here.
    """
    earlier = sorted(directory.glob(f"{EVENTS}*"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for number, path in enumerate(earlier):
        if path.name >= f"{EVENTS}{second - 1:010d}":
            path.rename(directory / f"{EVENTS}{second - 1:010d}.{number:06d}")


def flat_settings(tree: Value, above: str = "") -> dict[str, bool | float | str]:
    """Settings by their dotted keys, each a number, a truth value or text; unset ones are left out."""
    if isinstance(tree, dict):
        parts = (flat_settings(value, f"{above}.{name}" if above else name) for name, value in tree.items())
        return {key: value for part in parts for key, value in part.items()}
    if tree is None:
        return {}
    return {above: tree if isinstance(tree, bool | int | float) else str(tree)}


class WeightsAndBiases:
    """The same rows at wandb.ai; a resumed run continues there under the identity kept in `wandb_id`."""

    def __init__(self, directory: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "Logging to Weights & Biases needs its package. Install it with: pip install wandb "
                "(the extra 'wandb' of this project), or switch it off."
            ) from None
        identity = directory / "wandb_id"
        if not identity.exists():
            write_text(identity, secrets.token_hex(4))
        self._run = wandb.init(
            project="ssl-pipeline",
            name=directory.name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(directory),
        )
        self._run.define_metric("*", step_metric="step")  # its own counter would refuse the steps done again

    def log(self, row: Row) -> None:
        self._run.log(dict(row))

    def close(self) -> None:
        self._run.finish()


class ProgressBar:
    """The progress line of a terminal; on a narrow one with fewer numbers, and without the bar itself."""

    def __init__(self, stream: TextIO, *, total_steps: int, first_step: int) -> None:
        from tqdm import tqdm

        self._row: Row = {}
        self._shown = time.monotonic()
        self._room = _columns(stream) - len(" 12% step 12345/123456 [12:34:56<12:34:56, ]")
        bar = "|{bar}|" if self._room > 50 else ""
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            file=stream,
            dynamic_ncols=True,
            bar_format=f"{{percentage:3.0f}}%{bar} step {{n_fmt}}/{{total_fmt}} [{{elapsed}}<{{remaining}}{{postfix}}]",
        )

    def log(self, row: Row) -> None:
        self._row = {**self._row, **row}
        self._show()
        self.advance(int(row["step"] or 0))

    def advance(self, step: int, now: Now | None = None) -> None:
        if now is not None and time.monotonic() - self._shown >= SECONDS_BETWEEN_NUMBERS:
            self._row = {**self._row, **now()}
            self._show()
        self._bar.update(step - self._bar.n)

    def _show(self) -> None:
        text = summary(self._row)
        if len(text) > self._room - 10:  # what the bar needs to be one
            text = summary(self._row, forms=FEW_NUMBERS)
        self._bar.set_postfix_str(text, refresh=False)
        self._shown = time.monotonic()

    def message(self, text: str) -> None:
        self._bar.write(printable(text), file=self._bar.fp)

    def close(self) -> None:
        self._bar.close()


class ProgressLines:
    """The progress line of a log file: a plain line now and then, and one at the end."""

    def __init__(
        self,
        stream: TextIO,
        *,
        total_steps: int,
        first_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._first_step = self._step = self._printed_step = first_step
        self._clock = clock
        self._started = self._printed = clock()
        self._row: Row = {}
        self._now: Now | None = None

    def log(self, row: Row) -> None:
        self._row, self._now = {**self._row, **row}, None
        self.advance(int(row["step"] or 0))

    def advance(self, step: int, now: Now | None = None) -> None:
        if step != self._step or now is not None:
            self._now = now
        self._step = step
        if self._clock() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def message(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)

    def close(self) -> None:
        if self._step != self._printed_step:
            self._print()

    def _print(self) -> None:
        self._printed = self._clock()
        self._printed_step = self._step
        if self._now is not None:
            self._row = {**self._row, **self._now()}
        parts = [f"step {self._step}/{self._total_steps}", summary(self._row)]
        done = self._step - self._first_step
        if done > 0 and self._step < self._total_steps:
            left = (self._printed - self._started) / done * (self._total_steps - self._step)
            parts.append(f"{duration(left)} left")
        self.message(", ".join(part for part in parts if part))


def summary(row: Row, *, forms: Mapping[str, str] = NUMBERS) -> str:
    """The part of a row that shows whether a run goes well: "loss 2.31, learning rate 0.0005, 812 images/s, ..." """
    return ", ".join(form.format(row[name]) for name, form in forms.items() if row.get(name) is not None)


def _columns(stream: TextIO) -> int:
    """How wide a terminal is; anything else has room for all."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 200


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3725 is "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
