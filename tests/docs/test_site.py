"""The pages: each is in the navigation, their links lead somewhere, and they build without a network."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")
INCLUDED = runpy.run_path(str(DOCS / "included.py"))
NO_PAGES = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["exclude_docs"].split()
NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")


def pages_of(tree: object) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [page for part in parts for page in pages_of(part)]


def test_each_page_is_in_the_navigation_once():
    listed = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))], ids=str)
def test_links_between_files_lead_somewhere(page):
    for name, part in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / name
        assert target.exists(), name
        if part:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert part[1:] in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], part


def test_included_files_have_links_from_docs():
    text = "[a](docs/few_labels.md#x) [b](CONTRIBUTING.md) ![c](docs/pictures/report.png) [d](https://x.org/docs/A.md)"
    there = "[a](few_labels.md#x) [b](contributing.md) ![c](pictures/report.png) [d](https://x.org/docs/A.md)"
    assert INCLUDED["with_links_from_docs"](text) == there


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_of_a_page_as_it_is_built_stay_below_docs(page):
    text = INCLUDED["on_page_markdown"](page.read_text(encoding="utf-8"), page=None)
    assert '--8<-- "' not in text
    assert text.count("\n") > 5
    for name, _ in LINK.findall(text):
        target = (page.parent / name).resolve()
        assert target.is_file(), name
        parts = target.relative_to(DOCS).parts  # ValueError where it leads out of docs/
        assert not {target.name, *(f"{part}/" for part in parts)} & set(NO_PAGES), name


@pytest.mark.slow
def test_the_pages_build_without_a_network(tmp_path):
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        pytest.skip(f"needs the extra docs ({', '.join(missing)})")
    offline = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    built = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "ssl_pipeline.load" in built
    assert "nt_xent" in built
