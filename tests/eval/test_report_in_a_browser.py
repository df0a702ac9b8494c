"""A run's page in a real Chromium: no word in the console, every figure is seen, nothing comes from the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_pipeline.commands import report
from ssl_pipeline.config import run_command
from ssl_pipeline.eval.report import ReportConfig
from tests.chromium import find_chromium, look_at
from tests.runs import _pretrain, write_recipe
from tests.tiny import write_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a run with masks, tokens, labelled neighbours, curves: MAE on a few images, measured."""
    folder = tmp_path_factory.mktemp("browser")
    shards, run = write_shards(folder / "shards"), folder / "run"
    train = {"steps": 6, "save_every": 3, "log_every": 1, "hang_timeout": 0}
    recipe = write_recipe(folder / "tiny.yaml", "mae", shards, train=train)
    assert _pretrain([f"recipe={recipe}", f"output={run}"]) == 0
    arguments = [f"run={run}", f"train={shards}", f"test={shards}", "device=cpu"]
    assert run_command(ReportConfig, report.main, command="", argv=arguments) == 0
    return run / "report" / "index.html"


@pytest.mark.parametrize(("width", "dark"), [(375, False), (375, True), (1600, False), (1600, True)])
def test_all_is_seen_and_nothing_is_loaded(page: Path, width: int, dark: bool) -> None:
    seen = look_at(page, width=width, dark=dark)
    assert seen.console == []
    assert all(address.startswith("data:") for address in seen.loaded)
    kinds = {figure["kind"].lower() for figure in seen.figures}
    assert kinds == {"img", "svg", "image"}
    assert len(seen.figures) > 60
    for figure in seen.figures:
        assert figure["drawn"] > 0
        assert min(figure["width"], figure["height"]) > 8
        assert figure["right"] <= width
    assert seen.width <= width, "the page itself does not scroll sideways"
    red, green, blue = (int(part) for part in seen.background.removeprefix("rgb(").removesuffix(")").split(","))
    assert (red + green + blue < 3 * 128) == dark


def test_what_a_page_must_not_load_is_noticed(page: Path, tmp_path: Path) -> None:
    other = tmp_path / "index.html"
    other.write_text(page.read_text().replace("<main>", '<main><img src="https://localhost/none.png" alt="">'))
    seen = look_at(other, width=1600)
    assert any("none.png" in line for line in seen.console)
    assert min(figure["drawn"] for figure in seen.figures) == 0
