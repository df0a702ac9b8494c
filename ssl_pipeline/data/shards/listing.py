"""Which shards `data.shards=` means: a directory, files, patterns, braces, and lists of these."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.config import ConfigError, at_home, is_there
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.shards.rows import IMAGE_EXTENSIONS

MAX_ALTERNATIVES = 1_000_000  # of braces
OTHER_FILES = {**{f".{extension}": "an image" for extension in IMAGE_EXTENSIONS}, ".zip": "a zip"}  # taken for shards
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")

ShardSource = str | Path | Sequence[str]


@dataclass(frozen=True)
class ShardList:
    """The names of shards below a folder, sorted. `selection` says which, "" for all of the folder."""

    folder: Path
    names: list[str]
    selection: str

    @property
    def whole_folder(self) -> bool:
        return not self.selection

    @property
    def in_one_folder(self) -> bool:
        return not any("/" in name for name in self.names)


def list_shards(source: ShardSource) -> ShardList:
    """The shards of a directory, of files, of patterns such as `DIR/train-*.tar`, or `DIR/train-{000..099}.tar`.

    `~` is the home directory; a list takes several of these, in any folders. Raises DataError for one that does not
    exist.
    """
    texts = [source] if isinstance(source, str | Path) else list(source)
    places = [Path(at_home(place)) for text in texts for place in _alternatives(str(text))]
    if not places:
        raise DataError("The list of shards is empty.")
    if len(places) == 1 and places[0].is_dir():
        return ShardList(places[0], _in_directory(places[0]), "")
    paths = [path for place in places for path in _matching(place)]
    parents = {path.parent for path in paths}
    folder = parents.pop() if len(parents) == 1 else Path(os.path.commonpath([path.absolute() for path in paths]))
    if parents:
        folder = folder if folder.is_dir() else folder.parent
        names = [path.absolute().relative_to(folder).as_posix() for path in paths]
    else:
        names = [path.name for path in paths]
    selection = places[0].name if len(places) == 1 else "\n".join(sorted(set(names)))
    return ShardList(folder, sorted(set(names)), selection)


def shards_may_be_at(source: object) -> bool:
    """Whether there are shards where a setting says; those elsewhere (s3://) are checked when they are read."""
    if isinstance(source, list | tuple) and source:
        return all(shards_may_be_at(one) for one in source)
    if not isinstance(source, str | Path):
        return False
    if "://" in str(source):
        return True
    try:
        list_shards(source)
    except ConfigError:
        return False
    return True


def _alternatives(text: str) -> Iterator[str]:
    """The texts that braces expand to: `{a,b}`, and `{000..012}` with as many digits."""
    match = BRACES.search(text)
    if match is None or is_there(text):
        yield text
        return
    numbers = RANGE.fullmatch(match[1])
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < MAX_ALTERNATIVES:
            raise DataError(f"'{text}' must count upwards, to at most {MAX_ALTERNATIVES:,} shards.")
        choices = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise DataError(f"'{text}' has braces that are neither {{000..099}} nor {{a,b}}.")
    for choice in choices:
        yield from _alternatives(text[: match.start()] + choice + text[match.end() :])


def _matching(path: Path) -> list[Path]:
    """The shards of one directory, file or pattern; DataError if there are none."""
    if path.is_dir():
        return [path / name for name in _in_directory(path)]
    if path.is_file():
        _refuse_other(path)
        return [path]
    if not (path.parent.is_dir() and any(sign in path.name for sign in "*?[")):
        raise DataError(
            f"There is no directory or file '{path}'. Needed: a directory of .tar shards, DIR/PREFIX-*.tar, "
            "DIR/PREFIX-{000..099}.tar, or a list of these."
        )
    names = _names(path.parent, path.name)
    if not names:
        raise _no_shard(path, path.parent)
    return [path.parent / name for name in names]


def _refuse_other(path: Path) -> None:
    """Raise DataError for a file whose name is not that of a shard."""
    what = OTHER_FILES.get(path.suffix.lower())
    if what is not None:
        raise DataError(
            f"'{path}' is {what}, but shards are needed here: .tar files, or a folder of them. make_shards makes them "
            "from images; pretrain.py takes them as images=."
        )


def _in_directory(folder: Path) -> list[str]:
    names = _names(folder, "*.tar")
    if not names:
        raise _no_shard(folder, folder)
    return names


def _names(folder: Path, pattern: str) -> list[str]:
    matches = re.compile(fnmatch.translate(pattern)).match
    with os.scandir(folder) as found:  # tells files from folders without asking for each
        return sorted(
            entry.name for entry in found if matches(entry.name) and not entry.name.startswith(".") and entry.is_file()
        )


def _no_shard(path: Path, folder: Path) -> DataError:
    packed, below = next(folder.glob("*.t*gz"), None), next(folder.glob("*/*.tar"), None)
    hint = f" '{packed.name}' is compressed: unpack it first." if packed else ""
    hint += f" There are some in '{below.parent}'." if below else ""
    return DataError(f"'{path}' holds no .tar shard.{hint} Make some: python -m data_tools.make_shards --help")
