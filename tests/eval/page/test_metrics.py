"""Every metric that a run logs is explained, on the page and in docs/report.md; so is every rule of the doctor."""

from __future__ import annotations

import json
from pathlib import Path

from ssl_pipeline.eval.page.metrics import AXES, MONITORED, READING
from ssl_pipeline.run.doctor import RULES

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
RECORDED = ROOT / "tests" / "run" / "doctor" / "recorded"


def test_what_recorded_runs_log_can_be_read_about() -> None:
    logged = {name for path in RECORDED.glob("*.json") for row in json.loads(path.read_text())["rows"] for name in row}
    assert len(logged) > 30
    assert logged - set(AXES) - set(READING) == set()
    assert set(MONITORED) <= set(READING)


def test_the_documentation_has_each_of_them() -> None:
    assert [name for name, words in READING.items() if f"| `{name}` | {words} |" not in DOCS] == []
    assert [rule.__name__ for rule in RULES if f"| `{rule.__name__}` |" not in DOCS] == []
