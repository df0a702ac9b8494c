"""The small data set and the run that ended, which the evaluators are tested on too, and a folder of photographs."""

from pathlib import Path

import pytest

from ssl_pipeline.commands.pages_on_the_way import PagesOnTheWay
from tests.commands.photographs import save_photographs
from tests.eval.conftest import run, test, train

__all__ = ["photos", "run", "test", "train"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photographs(tmp_path / "photos")


@pytest.fixture(autouse=True)
def no_page_at_the_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of photographs write none, which takes seconds each, but where pages are tested."""
    if request.path.name != "test_page_of_a_run.py":
        monkeypatch.setattr(PagesOnTheWay, "_start", lambda self, **_: None)
