"""A hook of mkdocs: CHANGELOG.md and CONTRIBUTING.md as pages, with links that lead to pages.

Beside README.md their links begin with `docs/`, as GitHub needs it; below docs/ the same links do without.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INCLUDED = re.compile(r'^--8<-- "([\w.]+)"$', re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """The text of a page; a line `--8<-- "FILE.md"` is that file of the repository's root."""
    return INCLUDED.sub(lambda found: with_links_from_docs((ROOT / found[1]).read_text(encoding="utf-8")), markdown)


def with_links_from_docs(text: str) -> str:
    """A text of the repository's root as it must read below docs/: `docs/NAME` is NAME, NAME.md the page name.md."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\]\(([A-Z]+\.md)", lambda found: f"]({found[1].lower()}", text)
