"""Pieces of a page that needs nothing but itself: text is escaped here, and here alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ssl_pipeline.config import printable

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --faint: #667; --line: #d8dbe0; --back: #fff; --curve: #2563a8;
  --good: #22863a; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --faint: #9aa3ad; --line: #3a4048; --back: #16191d;
  --curve: #6cb0f5; --good: #56c271; --bad: #f07767; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1200px;
  margin: 0 auto; padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid var(--line); }
.lead { font-size: 1.1em; } .warning { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; } th, td { padding: 3px 12px 3px 0; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 12px; }
figure { margin: 0; } figcaption { font-size: 0.85em; color: var(--faint); }
svg { width: 100%; height: auto; } svg text { font: 10px system-ui, sans-serif; fill: var(--faint); }
.curve { fill: none; stroke: var(--curve); stroke-width: 1.6; } .dot { fill: var(--curve); }
.axis { fill: none; stroke: var(--faint); } .grid { stroke: var(--line); stroke-width: 0.6; }
.start { stroke: var(--faint); stroke-dasharray: 4 3; }
.neighbours { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 8px; }
.neighbours figure { width: 80px; } .neighbours img { width: 72px; height: 72px; border: 3px solid var(--line);
  border-radius: 4px; } .same img { border-color: var(--good); } .other img { border-color: var(--bad); }
.query { margin-right: 12px; } pre { overflow-x: auto; font-size: 0.85em; }
"""


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """A whole document; `sections` are made by the functions of this module."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><h1>{text(title)}</h1>\n"
        f'<p class="lead">{text(lead)}</p>\n' + "\n".join(sections) + "\n</body></html>\n"
    )


def text(words: object) -> str:
    """Words of anybody as text that is nothing but text."""
    return escape(printable(str(words), longest=None))


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{text(title)}</h2>\n{''.join(parts)}</section>"


def paragraph(words: str, *, kind: str = "") -> str:
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def list_of(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>"


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, which scrolls in itself where the screen is narrow."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'


def cell_of(percent: float | None, interval: Sequence[float] | None = None) -> str:
    """A percentage, with its interval if it has one."""
    if percent is None:
        return "-"
    return f"{percent:.2f} %" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def figure(address: str, caption: str, *, kind: str) -> str:
    """A picture that the page holds itself."""
    return f'<figure class="{kind}"><img src="{address}" alt=""><figcaption>{text(caption)}</figcaption></figure>'


def curves(drawn: Sequence[tuple[str, str]]) -> str:
    """SVGs of this package, each with its title."""
    figures = (f"<figure><figcaption>{text(title)}</figcaption>{svg}</figure>" for title, svg in drawn)
    return f'<div class="curves">{"".join(figures)}</div>\n'


def folded(title: str, content: str) -> str:
    """Text of several lines that unfolds."""
    lines = "\n".join(text(line) for line in content.splitlines())
    return f"<details><summary>{text(title)}</summary><pre>{lines}</pre></details>"
