"""A run as one page that people look at, or several side by side: what they learnt, and how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from ssl_pipeline.config import Config, ConfigError, PlaceText
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.eval.page.classes import classes_section
from ssl_pipeline.eval.page.embedding_map import map_section
from ssl_pipeline.eval.page.examples import is_there, look_at_examples
from ssl_pipeline.eval.page.html import Section, page, paragraph, section, table_of
from ssl_pipeline.eval.page.neighbours import TITLE as NEIGHBOURS
from ssl_pipeline.eval.page.neighbours import neighbours_of_examples, neighbours_of_suite
from ssl_pipeline.eval.page.overview import conclusion, findings_section, tiles
from ssl_pipeline.eval.page.progress import curves_section, monitors_section
from ssl_pipeline.eval.page.record import Record, read_record, told_apart
from ssl_pipeline.eval.page.results import results_section
from ssl_pipeline.eval.page.settings import facts, settings_section
from ssl_pipeline.eval.page.token_maps import token_section

UNSHOWN = (ConfigError, DataError, OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
"""Errors from images, weights and reports of others: the page shows them in place of the pictures."""

ENDINGS = (".html", ".htm")
LONGEST_NAME = 100  # characters of a file's name for several runs

OfMethod = Callable[[Record], Sequence[Section]]


class ReportConfig(Config):
    """A run as one self-contained page: curves, what the doctor says, evaluations, and pictures of what it sees and
    learnt. It may still be training. Several runs (`run=A,B`) are laid over each other, on a page next to that of the
    first, `A/report/with_B.html`; the pictures are of the first.
    """

    positional = "run"

    run: tuple[Path, ...] = Field(min_length=1)
    """The run's directory, or several: `run=A,B`."""
    train: PlaceText | None = None
    """Labelled training images, shards or a folder or zip of class folders: with `test` each run is measured on them
    first, as eval.suite does."""
    test: PlaceText | None = None
    """Labelled test images, with the same classes; without `train` they are the images of the pictures."""
    images: Annotated[int, Field(ge=0, le=10_000)] = 500
    """How many images go through the backbone for the pictures of what it learnt; 0 leaves these out."""
    device: str = "auto"
    """Device of the backbone: `auto` takes the GPU if there is one."""
    tensorboard: bool = False
    """Whether views, neighbours and reconstructions go to TensorBoard too, in addition to the page: the run
    NAME/report."""
    output: Path | None = None
    """The file that is written, NAME.html, or a directory for index.html; by default `report` in the (first) run."""

    @model_validator(mode="after")
    def _two_sets_or_one_of_pictures(self) -> ReportConfig:
        if self.train is not None and self.test is None:
            raise ValueError("train needs test. Set test=SHARDS too.")
        if len({run.resolve() for run in self.run}) < len(self.run):
            raise ValueError("run names one directory twice.")
        if self.output is not None and not _names_a_page(self.output):
            raise ValueError(f"output must be a file NAME.html or a directory. Got {self.output}.")
        return self

    @property
    def place(self) -> Path:
        """The file that is written: a page of several runs has its own name, and the first one's is kept."""
        place = self.run[0] / "report" if self.output is None else self.output
        return place if place.suffix.lower() in ENDINGS and not place.is_dir() else place / file_for(self.run)


def report_page(config: ReportConfig, of_method: OfMethod = lambda record: ()) -> str:
    """The page, as HTML that loads nothing; `of_method` has the sections that only the run's method can make.

    Raises ConfigError for a directory in which nothing ran.
    """
    records = told_apart([read_record(run) for run in config.run])
    first = records[0]
    sections = [
        findings_section(records),
        results_section(records),
        *monitors_section(records),
        *curves_section(records),
        *(of_one(part, records) for part in (*(of_method(first) if config.images else ()), *_learnt(first, config))),
        *(section(title, table_of(["", ""], facts(one), kind="facts")) for title, one in _named(records)),
        *settings_section(records),
    ]
    state = first.status.state if first.status is not None and len(records) == 1 else ""
    foot = "Written by eval.report of ssl-pipeline. The page is self-contained and loads nothing."
    title = " and ".join(record.name for record in records)
    return page(title, state, conclusion(records), tiles(first) if len(records) == 1 else (), sections, foot=foot)


def _names_a_page(output: Path) -> bool:
    """Whether it is a file for a page, or a directory, which may still have to be made."""
    return output.suffix.lower() in ENDINGS or output.is_dir() or not (output.suffix or output.exists())


def file_for(runs: Sequence[Path]) -> str:
    """The name of the page of one run, or of several with the first: `with_B.html`."""
    if len(runs) == 1:
        return "index.html"
    others = "_and_".join(run.resolve().name for run in runs[1:])
    if len(others) > LONGEST_NAME:
        others = f"{runs[1].resolve().name[:LONGEST_NAME]}_and_{len(runs) - 2}_others"
    return f"with_{others}.html"


def of_one(part: Section, records: Sequence[Record]) -> Section:
    """A section that says of which of several runs it is."""
    if len(records) == 1:
        return part
    return replace(part, parts=(paragraph(f"Of {records[0].name}."), *part.parts))


def _named(records: Sequence[Record]) -> list[tuple[str, Record]]:
    return [(f"Run {record.name}" if len(records) > 1 else "Run", record) for record in records]


def _learnt(record: Record, config: ReportConfig) -> list[Section]:
    """Neighbours, map, tokens and classes of one run, as far as there are images and weights for them."""
    suite = record.reports.get("suite")
    found: list[Section | None] = []
    if suite is not None and "neighbours" in suite:
        found.append(shown(NEIGHBOURS, lambda: neighbours_of_suite(suite)))
    if config.images and not is_there(record.path):
        found.append(section("What it learnt", paragraph("Pictures of it come with the run's first checkpoint.")))
    elif config.images:
        try:
            examples = look_at_examples(record, config.test, count=config.images, device=config.device)
        except UNSHOWN as error:
            found.append(section("What it learnt", paragraph(unshown(error))))
        else:
            if suite is None:
                found.append(shown(NEIGHBOURS, lambda: neighbours_of_examples(examples)))
            found.append(shown("Map of the embeddings", lambda: map_section(examples)))
            found.append(shown("Patches and attention", lambda: token_section(examples)))
    if suite is not None:
        found.append(shown("By class", lambda: classes_section(suite)))
    return [part for part in found if part is not None]


def shown(title: str, make: Callable[[], Section | None]) -> Section | None:
    """A section, or one that says why it is missing."""
    try:
        return make()
    except UNSHOWN as error:
        return section(title, paragraph(unshown(error)))


def unshown(error: BaseException) -> str:
    """Why something is not on the page."""
    if isinstance(error, KeyError | TypeError | AttributeError):
        return f"This cannot be shown: the report lacks {error}. Run its evaluator again."
    return f"This cannot be shown: {error}"
