"""The images of a source and their classes, by the names of files and folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssl_pipeline.data.shards.rows import IMAGE_EXTENSIONS
from ssl_pipeline.data_tools.sources import Source

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}


@dataclass(frozen=True)
class Candidate:
    """A file of the source that looks like an image, and its class."""

    name: str
    label: int | None


@dataclass(frozen=True)
class Rejected:
    """A file that is left out."""

    file: str
    reason: str


def find_candidates(
    source: Source, *, labels: Literal["folders", "none"] | None = None
) -> tuple[list[Candidate], list[str] | None, list[Rejected]]:
    """Image files with their labels, the class names, and what is no image file.

    Classes are the top folders, sorted, the empty ones among them; without any, or with labels="none", no image has a
    label.
    """
    images, others = dict[str, list[str]](), list[Rejected]()
    for name in source.names():
        parts = path_parts(name)
        if not parts or _is_hidden(parts):
            others.append(Rejected(name, "hidden file"))
        elif Path(parts[-1]).suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
            others.append(Rejected(name, "no image file"))
        else:
            images[name] = parts
    if labels == "none" or all(len(parts) == 1 for parts in images.values()):
        return [Candidate(name, None) for name in images], None, others
    folders = [parts for parts in map(path_parts, source.folders()) if parts and not _is_hidden(parts)]
    class_names = sorted({parts[0] for parts in images.values() if len(parts) > 1} | {parts[0] for parts in folders})
    label_of = {name: label for label, name in enumerate(class_names)}
    others += [Rejected(name, "outside the class folders") for name, parts in images.items() if len(parts) == 1]
    candidates = [Candidate(name, label_of[parts[0]]) for name, parts in images.items() if len(parts) > 1]
    return candidates, class_names, others


def looks_like_splits(class_names: Sequence[str]) -> bool:
    """Whether folders are parts of a data set: train, test and the like, and nothing else."""
    return SPLITS.issuperset(name.lower() for name in class_names)


def path_parts(name: str) -> list[str]:
    """Folders and file of a name; `/`, `.` and `..` only move about and are no part of it."""
    return [part for part in name.split("/") if part not in ("", ".", "..")]


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)
