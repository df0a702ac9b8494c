"""Figures of evaluators that list their measures, as the page shows them."""

from __future__ import annotations

from ssl_pipeline.eval.page.html import Cell
from ssl_pipeline.eval.page.results import lists_measures, measure_rows


def report(value: float, evaluator: str = "few_shot", **more: object) -> dict[str, object]:
    measure = {"name": "top1_5", "title": "top-1, 5 per class", "value": value, "unit": "%"}
    bare = {"name": "rank", "title": "rank", "value": 12.34567, "unit": "", "interval": None, "spread": None}
    return {"evaluator": evaluator, "measures": [{**measure, "interval": None, "spread": None, **more}, bare]}


def test_a_row_for_each_measure_and_a_column_for_each_network() -> None:
    rows = measure_rows({"mine": report(61.25, interval=[60.1, 62.34], spread=1.5), "random": report(20.0)})
    assert rows[0] == [
        "top-1, 5 per class",
        Cell("61.25 %", "+- 1.50 (60.1 to 62.3)", 0.6125),
        Cell("20.00 %", "", 0.2),
    ]
    assert rows[1] == ["rank", Cell("12.35"), Cell("12.35")]
    assert measure_rows({"mine": report(1.0), "empty": {"measures": []}})[0][-1] == "-"


def test_reports_with_figures_elsewhere_are_shown_by_their_paths() -> None:
    assert lists_measures(report(1.0))
    assert not lists_measures(report(1.0, evaluator="suite"))
    assert not lists_measures({"top1": 3.0})
