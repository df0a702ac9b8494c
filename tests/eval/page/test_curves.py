"""Curves: where a point lies, which points are kept, and that they are SVG."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ssl_pipeline.config import ConfigError
from ssl_pipeline.eval.page.curves import BOTTOM, HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, WIDTH, curve, thinned
from ssl_pipeline.eval.page.metrics import Series, read_series


def drawn(*lines: Series) -> str:
    return curve([(place, f"run {place}", line) for place, line in enumerate(lines)])


def points(svg: str) -> list[tuple[float, float]]:
    (line,) = ET.fromstring(svg).iter("polyline")
    return [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]


def test_the_first_point_is_left_and_a_larger_value_higher() -> None:
    (x0, y0), (x1, y1), (x2, y2) = points(drawn(Series("loss", [10, 20, 30], [3.0, 1.0, 2.0])))
    assert (x0, x1, x2) == (LEFT, LEFT + (WIDTH - LEFT - RIGHT) / 2, WIDTH - RIGHT)
    assert TOP < y0 < y2 < y1 < HEIGHT - BOTTOM
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_the_start_is_a_line_through_its_point() -> None:
    svg = drawn(Series("knn_top1", [0, 5], [40.0, 60.0]))
    (start,) = (line for line in ET.fromstring(svg).iter("line") if line.attrib["class"] == "start")
    assert float(start.attrib["y1"]) == pytest.approx(points(svg)[0][1], abs=0.1)
    assert 'class="start"' not in drawn(Series("knn_top1", [1, 5], [40.0, 60.0]))


def test_runs_share_the_axes() -> None:
    svg = drawn(Series("loss", [0, 10], [1.0, 2.0]), Series("loss", [0, 20], [1.0, 3.0]))
    short, long = ET.fromstring(svg).iter("polyline")
    ends = [tuple(map(float, line.attrib["points"].split()[-1].split(","))) for line in (short, long)]
    assert ends[0][0] == pytest.approx((LEFT + ends[1][0]) / 2)
    assert ends[0][1] > ends[1][1]
    assert (short.attrib["stroke"], long.attrib["stroke"]) == ("var(--run-0)", "var(--run-1)")


def test_axes_have_round_numbers() -> None:
    texts = [text.text for text in ET.fromstring(drawn(Series("loss", [0, 9], [0.013, 0.987]))).iter("text")]
    assert texts == ["0", "0.2", "0.4", "0.6", "0.8", "1", "step 0", "9"]


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [-1e-30, 1e-30], [1e300, -1e300], [5.0]])
def test_any_numbers_are_drawn_inside(values: list[float]) -> None:
    for x, y in points(drawn(Series("loss", list(range(len(values))), values))):
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT - BOTTOM


def test_no_peak_is_lost_where_points_are_left_out() -> None:
    values = [float(number % 7) for number in range(10_000)]
    values[4321], values[4322] = 1000.0, -1000.0
    kept = thinned(Series("loss", list(range(10_000)), values))
    assert len(kept) <= MOST_POINTS
    assert {(4321, 1000.0), (4322, -1000.0)} <= set(kept)
    assert kept == sorted(kept)


def write(run: Path, *rows: object, end: str = "") -> Path:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return run


def test_series_are_read_and_ordered(tmp_path: Path) -> None:
    run = write(
        tmp_path,
        {"step": 0, "position": 0, "knn_top1": 20.0},
        {"step": 5, "position": 40, "epoch": 0.5, "zeta": 1, "loss": 2.5, "knn_error": "no", "flag": True},
        {"step": 10, "position": 80, "loss": None, "knn_top1": 70.0},
        {"step": 15, "position": 120, "knn_top1": 60.0},
        end='{"step": 20, "lo',
    )
    loss, knn, zeta = read_series(run)
    assert (loss.name, loss.steps, loss.values) == ("loss", [5], [2.5])
    assert (knn.start, knn.best(), knn.values[-1]) == (20.0, (70.0, 10), 60.0)
    assert (zeta.name, zeta.values, zeta.start, zeta.best()) == ("zeta", [1.0], None, None)


def test_a_file_that_is_no_log_is_told(tmp_path: Path) -> None:
    assert read_series(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text("nothing\nof it\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl has no row that can be read"):
        read_series(tmp_path)
