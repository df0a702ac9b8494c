"""Pieces of a self-contained page: text is escaped here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ssl_pipeline.config import printable
from ssl_pipeline.eval.page.places import shortened
from ssl_pipeline.eval.page.style import NUM_COLOURS, STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load of the page: nothing from anywhere, and no script."""


@dataclass(frozen=True)
class Section:
    """A part of the page with its own title; `parts` are made by the functions of this module."""

    title: str
    parts: tuple[str, ...]

    @property
    def anchor(self) -> str:
        return re.sub("[^a-z]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a figure, its uncertainty, and the share of a bar below it."""

    text: str
    small: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first: what it is, its value, and what to compare it with."""

    title: str
    value: str
    note: str = ""


def page(title: str, state: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section], *, foot: str) -> str:
    """A whole document."""
    links = "".join(f'<a href="#{part.anchor}">{text(part.title)}</a>' for part in sections)
    badge = f'<span class="state {state}">{text(state)}</span>' if state else ""
    shown = "".join(map(_tile, tiles))
    shown = f'<div class="tiles">{shown}</div>' if shown else ""
    body = "\n".join(
        f'<section id="{part.anchor}"><h2>{text(part.title)}</h2>\n{"".join(part.parts)}</section>' for part in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><header><h1>{text(title)}{badge}</h1>\n"
        f'<p class="lead">{text(lead)}</p>\n{shown}</header>\n<nav><div>{links}</div></nav>\n'
        f"<main>{body}</main>\n<footer>{text(foot)}</footer></body></html>\n"
    )


def _tile(tile: Tile) -> str:
    note = f"<span>{text(tile.note)}</span>" if tile.note else ""
    return f'<div class="tile"><span>{text(tile.title)}</span><b>{text(tile.value)}</b>{note}</div>'


def text(words: object) -> str:
    """Any text, escaped and without the paths of a machine."""
    return escape(shortened(printable(str(words), longest=None)))


def section(title: str, *parts: str) -> Section:
    return Section(title, parts)


def about(words: str) -> str:
    """What a figure shows and how it is read."""
    return paragraph(words, kind="about")


def heading(words: str) -> str:
    """A title within a section."""
    return f"<h3>{text(words)}</h3>\n"


def paragraph(words: str, *, kind: str = "") -> str:
    return f'<p class="{kind}">{text(words)}</p>\n' if kind else f"<p>{text(words)}</p>\n"


def table_of(header: Sequence[str], rows: Sequence[Sequence[str | Cell]], *, kind: str = "") -> str:
    """A table, which scrolls in itself where the screen is narrow."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>\n'


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{text(cell)}</td>"
    small = f"<small>{text(cell.small)}</small>" if cell.small else ""
    if cell.share is None:
        return f"<td>{text(cell.text)}{small}</td>"
    share = min(max(cell.share, 0.0), 1.0)
    return f'<td class="share">{text(cell.text)}{small}<i style="width:{share:.1%}"></i></td>'


def finding(title: str, words: str, settings: str, *, kind: str = "") -> str:
    """Something that was noticed, and what helps."""
    keys = f" <code>{text(settings)}</code>" if settings else ""
    return f'<div class="finding {kind}"><b>{text(title)}</b><p>{text(words)}{keys}</p></div>\n'


def picture(data_url: str, caption: str, *, kind: str = "") -> str:
    """A picture that the page holds itself."""
    return (
        f'<figure class="{kind}"><img src="{data_url}" alt="{text(caption)}"><figcaption>{text(caption)}</figcaption>'
        "</figure>"
    )


def pictures(figures: Sequence[str], *, kind: str = "") -> str:
    """Pictures in a row, which goes on in the next line where the screen is narrow."""
    return f'<div class="pictures {kind}">{"".join(figures)}</div>\n'


def rows_of(rows: Sequence[str]) -> str:
    """Rows of pictures, side by side where the screen is wide."""
    return f'<div class="rows">{"".join(rows)}</div>\n'


def legend(names: Sequence[str]) -> str:
    """The colour of each name."""
    items = (f'<span><i style="background:{colour(place)}"></i>{text(name)}</span>' for place, name in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>\n'


def colour(place: int) -> str:
    """That of a run, or of a class, by its number."""
    return f"var(--run-{place % NUM_COLOURS})"


def curves(drawn: Sequence[tuple[str, str, str]]) -> str:
    """SVGs of this package, each with its title and its last figure."""
    figures = (
        f"<figure><figcaption><b>{text(title)}</b> {text(last)}</figcaption>{svg}</figure>"
        for title, last, svg in drawn
    )
    return f'<div class="curves">{"".join(figures)}</div>\n'


def folded(title: str, *parts: str) -> str:
    """Parts that unfold."""
    return f"<details><summary>{text(title)}</summary>{''.join(parts)}</details>\n"


def lines_of(content: str) -> str:
    """Text of several lines, unchanged."""
    lines = "\n".join(text(line) for line in content.splitlines())
    return f"<pre>{lines}</pre>"
