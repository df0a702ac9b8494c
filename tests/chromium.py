"""A page in a real browser, without a window: what it says in its console, what it loads, how it is laid out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HEIGHT, SECONDS = 1200, 120
PROBE = """<script>addEventListener("load", () => {
  const figures = [...document.querySelectorAll("img, svg, svg image")];
  const boxes = figures.map(figure => [figure, figure.getBoundingClientRect()]);
  parent.postMessage(JSON.stringify({
    figures: boxes.map(([figure, box]) => ({
      kind: figure.tagName, width: box.width, height: box.height, drawn: figure.naturalWidth ?? 1,
      right: figure.closest(".wide") ? 0 : box.right + scrollX})),
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    width: document.documentElement.scrollWidth, background: getComputedStyle(document.body).backgroundColor,
  }), "*");
})</script>"""
FRAME = """<!doctype html><body><iframe src="{page}" width="{width}" height="{height}" style="border: 0"></iframe>
<script>addEventListener("message", event => document.body.textContent = event.data)</script></body>"""


@dataclass(frozen=True)
class Looked:
    """What a browser made of a page. figures: kind, width, height, right end and width of what is drawn of each."""

    console: list[str]
    figures: list[dict[str, float]]
    loaded: list[str]
    width: float
    background: str


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def look_at(page: Path, *, width: int, dark: bool = False) -> Looked:
    """Open a page in a frame of `width` pixels; the copy that is measured may run a script, and load no more."""
    with tempfile.TemporaryDirectory() as place:
        html = page.read_text(encoding="utf-8")
        assert "<script" not in html
        console = _run(place, page.resolve().as_uri(), dark=dark)[1]
        copy = Path(place) / "copy.html"
        copy.write_text(
            html.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';").replace(
                "</head>", f"{PROBE}</head>"
            )
        )
        frame = Path(place) / "frame.html"
        frame.write_text(FRAME.format(page=escape(copy.as_uri()), width=width, height=HEIGHT))
        dom, further = _run(place, frame.as_uri(), dark=dark)
    found = re.search(r"<body>(\{.*\})\s*</body>", dom, flags=re.S)
    assert found is not None, dom[:500]
    return Looked(console=[*console, *further], **json.loads(unescape(found.group(1))))


def _run(place: str, address: str, *, dark: bool) -> tuple[str, list[str]]:
    """The document as it is at the end, and the lines of its console."""
    browser = find_chromium()
    assert browser is not None
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",  # a container's root has none
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        f"--user-data-dir={tempfile.mkdtemp(dir=place)}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        "--dump-dom",
        address,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
