"""What README, CONTRIBUTING and docs/ name is there: files, modules of commands, links."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
ROOMS = ("recipes", "tests", "ssl_pipeline", "docs", "benchmarks", ".ci", "eval", "data_tools")


def paths_in(text: str) -> set[str]:
    """Words in backticks and targets of links that are paths in this repository, placeholders left out."""
    words = re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?|[\w.-]+/)`", text) + re.findall(r"\]\(([^)#:]+)\)", text)
    ours = (word for word in words if word.endswith((".py", ".md", ".yaml")) or word.split("/")[0] in ROOMS)
    made_by_runs = {"eval/suite.json", "eval/cache"}
    return {word for word in ours if not re.search(r"(?<![\w.])[A-Z_]{3,}(?!\.md)", word)} - made_by_runs


def test_paths_are_found_and_placeholders_are_none():
    text = "`eval/blocks.py` `eval/NAME.py` `runs/photos/images` [weights](docs/weights.md) `data/order.py`"
    assert paths_in(text) == {"eval/blocks.py", "docs/weights.md", "data/order.py"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_a_document_exists(document):
    places = (ROOT, ROOT / "ssl_pipeline", document.parent)
    missing = sorted(
        path for path in paths_in(document.read_text()) if not any((place / path).exists() for place in places)
    )
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_module_that_a_command_calls_exists(document):
    text = document.read_text()
    named = set(re.findall(r"python -m ((?:eval|data_tools|ssl_pipeline|benchmarks)[\w.]*)", text))
    assert not [module for module in sorted(named) if find_spec(module.rstrip(".")) is None]
