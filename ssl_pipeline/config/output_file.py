"""A file that a command writes: of which kinds it may be, and that one which is there already stays."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import field_validator

from ssl_pipeline.config.base import Config, ConfigError


def refuse_existing(*files: Path, overwrite: bool) -> None:
    """Raise ConfigError for the first file that is there, unless it may be replaced."""
    there = next((file for file in files if file.exists()), None)
    if there is not None and not overwrite:
        raise ConfigError(f"output={there} exists. Choose another name, or set overwrite=true.")


class OutputFile(Config):
    """The settings of a command that writes one file, and maybe others beside it."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """How its name may end."""

    output: Path
    """The file that is written."""
    overwrite: bool = False
    """Whether a file that is there already is replaced."""

    @field_validator("output")
    @classmethod
    def _known_suffix(cls, output: Path) -> Path:
        if output.suffix not in cls.suffixes:
            *first, last = cls.suffixes
            known = f"{', '.join(first)} or {last}" if first else last
            raise ValueError(f"output must end in {known}. Got '{output.name}'.")
        return output

    @property
    def files(self) -> tuple[Path, ...]:
        """What is written."""
        return (self.output,)

    def begin_output(self) -> None:
        """Make the folder of the files; ConfigError if one of them is there and may not be replaced."""
        refuse_existing(*self.files, overwrite=self.overwrite)
        self.output.parent.mkdir(parents=True, exist_ok=True)
