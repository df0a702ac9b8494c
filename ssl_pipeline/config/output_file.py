"""What `output=` names: a folder that files go into, or one file, of kinds that a command writes.

Impossible ones are refused before anything is computed; existing files are kept.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, ClassVar

from pydantic import AfterValidator, field_validator

from ssl_pipeline.config.base import Config, ConfigError, at_home

FILE_SUFFIXES = (
    *(".bin", ".ckpt", ".csv", ".htm", ".html", ".json", ".jsonl", ".md", ".npy", ".npz", ".onnx", ".parquet", ".pdf"),
    *(".png", ".pt", ".pth", ".safetensors", ".svg", ".tar", ".txt", ".yaml", ".yml", ".zip"),
)
"""Endings by which a name is that of a file; a folder may have any other dot in its name, as resnet18.a1_in1k does."""


def is_a_folder(place: Path) -> Path:
    """The same place; ValueError if it has the name of a file, or is one, or lies under one."""
    at = Path(at_home(str(place)))
    if at.suffix.lower() in FILE_SUFFIXES and not at.is_dir():
        raise ValueError(
            f"must be a directory, in which files get their own names. Got the name of a file, '{at.name}'."
        )
    if file := _file_above(at):
        raise ValueError(f"must be a directory. '{file}' is a file.")
    return place


def _file_above(place: Path) -> Path | None:
    return next((path for path in (place, *place.parents) if path.is_file()), None)


Folder = Annotated[Path, AfterValidator(is_a_folder)]
"""A directory that a command writes into; it need not exist yet."""


def refuse_existing(*files: Path, overwrite: bool) -> None:
    """Raise ConfigError for the first file that is there, unless it may be replaced."""
    there = next((file for file in files if file.exists()), None)
    if there is not None and not overwrite:
        raise ConfigError(f"output={there} exists. Choose another name, or set overwrite=true.")


def require_writable(place: Path, *, key: str = "output") -> None:
    """Raise ConfigError if no file can be made in a folder, or where it would be; leaves nothing there."""
    folder = next((path for path in (place, *place.parents) if path.is_dir()), Path())
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{key} cannot be written: no file can be made in '{folder.absolute()}' ({error.strerror}). Choose a place "
            "that can be written."
        ) from None


class OutputFile(Config):
    """The settings of a command that writes one file, and maybe others next to it."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """How its name may end."""

    output: Path
    """The file that is written."""
    overwrite: bool = False
    """Whether an existing file is replaced."""

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
        """Make the folder of the files; ConfigError if that cannot be, or a file is there and may not be replaced."""
        if self.output.is_dir():
            raise ConfigError(f"output={self.output} is a directory, but a file is needed. Name one in it.")
        if file := _file_above(self.output.parent):
            raise ConfigError(f"output={self.output} cannot be written: '{file}' is a file, not a directory.")
        refuse_existing(*self.files, overwrite=self.overwrite)
        require_writable(self.output.parent, key=f"output={self.output}")
        self.output.parent.mkdir(parents=True, exist_ok=True)
