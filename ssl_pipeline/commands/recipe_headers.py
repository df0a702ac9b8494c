"""What the first lines of a recipe say: what it trains, after which paper, at what cost, with which figures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.recipes import text_of_recipe

UNKNOWN = "-"
NOT_YET = re.compile(r"(?:(?:[\w-]+ )?-(?:, )?)+|not (?:measured|trained) yet")  # "k-NN -, linear -, time -"


@dataclass(frozen=True)
class RecipeHeader:
    """The head of a recipe file; `UNKNOWN` for what it does not say.

    what: method, network, data and length. source: whose settings they are. cost: what theirs took.
    theirs, ours: the published figures, and those that were measured with this library.
    """

    name: str
    folder: str
    what: str
    source: str
    cost: str
    theirs: str
    ours: str


def read_header(path: Path) -> RecipeHeader:
    """The head of a recipe; raises ConfigError for a file that is no text or does not begin with a comment."""
    lines = takewhile(lambda line: line.startswith("#"), text_of_recipe(path).splitlines())
    paragraphs = "\n".join(line.removeprefix("#") for line in lines).replace("\n   ", " ").splitlines()
    if not paragraphs:
        raise ConfigError(f"{path} must begin with comments that say what it is, its source and figures.")
    what, _, source = paragraphs[0].strip().partition(": ")
    found = {label: _after(label, paragraphs) for label in ("Cost theirs", "Theirs", "Ours")}
    ours = UNKNOWN if NOT_YET.fullmatch(found["Ours"]) else found["Ours"]
    return RecipeHeader(
        path.stem, path.parent.name, what, source or UNKNOWN, found["Cost theirs"], found["Theirs"], ours
    )


def _after(label: str, paragraphs: list[str]) -> str:
    """The first sentence that `label:` begins, without its last point; entries of a line are three spaces apart."""
    entries = [entry for paragraph in paragraphs for entry in re.split(r"\s{3,}", paragraph.strip())]
    told = next((entry for entry in entries if entry.startswith(f"{label}: ")), "")
    return told.removeprefix(f"{label}: ").rstrip(".").strip() or UNKNOWN
