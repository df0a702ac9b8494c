"""`python -m eval.report`: a run's page, with what only its method can show: its views and what it reconstructs.

It is here because it combines two rooms that do not import each other: methods and evaluation.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ssl_pipeline.commands.pictures_of_method import method_sections
from ssl_pipeline.config import Tree, printable, run_command, validate
from ssl_pipeline.config.output_file import require_writable
from ssl_pipeline.eval.images import with_shards
from ssl_pipeline.eval.page.sheets import sheets
from ssl_pipeline.eval.report import ReportConfig, report_page
from ssl_pipeline.eval.suite import evaluate_suite
from ssl_pipeline.eval.suite_measures import SuiteConfig
from ssl_pipeline.files import write_text
from ssl_pipeline.run.directory import read_status


def report(config: ReportConfig) -> Path:
    """Measure the runs if labelled images are given, write the page and say where it is."""
    if config.train is not None:
        for run in config.run:
            given: Tree = {"run": str(run), "train": config.train, "test": config.test, "device": config.device}
            evaluate_suite(validate(SuiteConfig, given))
    html = report_page(config, method_sections)
    config.place.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.place, html)
    if config.tensorboard:
        to_tensorboard(config, html)
    return config.place


def to_tensorboard(config: ReportConfig, html: str) -> None:
    """The page's pictures at the step that the run has come to."""
    from torch.utils.tensorboard import SummaryWriter

    status = read_status(config.run[0])
    with SummaryWriter(str(config.place.parent)) as writer:
        for name, sheet_HWC in sheets(html).items():
            writer.add_image(name, sheet_HWC, status.step if status is not None else 0, dataformats="HWC")


def main(config: ReportConfig) -> None:
    print(printable(f"written to {report(config)}"))


def _from_images(config: ReportConfig) -> None:
    """With folders of images as shards; a page that cannot be written is refused before anything is packed."""
    require_writable(config.place.parent, key=f"{config.place}")
    main(with_shards(config, config.run[0]))


def command(name: str = "python -m eval.report") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(ReportConfig, _from_images, command=name)


if __name__ == "__main__":
    sys.exit(command())
