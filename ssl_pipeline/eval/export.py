"""The backbone of any run as files that timm reads: of a run that has not ended, of an earlier step, of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ssl_pipeline.backbones import load_run, save_backbone
from ssl_pipeline.config import Config, ConfigError, run_command


class ExportConfig(Config):
    """Write a backbone of a run as backbone.safetensors and backbone.json, as a run does at its end."""

    positional = "run"

    run: Path
    """The run's directory; it may still be training."""
    step: Annotated[int, Field(gt=0)] | None = None
    """What it had after so many steps, exported or in a checkpoint, instead of the newest."""
    which: str | None = None
    """A backbone of its checkpoints by name, `student` or `teacher`, instead of the one that it exports."""
    output: Path
    """Directory for the two files."""


def export(config: ExportConfig) -> None:
    """Write the files; ConfigError if there are some already."""
    there = [name for name in ("backbone.safetensors", "backbone.json") if (config.output / name).exists()]
    if there:
        raise ConfigError(f"output={config.output} has a {there[0]} already. Choose another directory, or remove it.")
    found = load_run(config.run, which=config.which, step=config.step)
    save_backbone(config.output, found.backbone, found.preprocessing, step=found.step)
    of_step = "" if found.step is None else f" of step {found.step}"
    print(f"Written to {config.output}: {found.name or 'the exported backbone'}{of_step} of {config.run}.")


def command(name: str = "python -m eval.export") -> int:
    """The command line, called `name`; returns the exit code."""
    return run_command(ExportConfig, export, command=name)
