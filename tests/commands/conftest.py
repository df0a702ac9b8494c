"""The small data set and the run that ended, which the evaluators are tested on too, and a folder of photographs."""

from pathlib import Path

import pytest

from tests.commands.photographs import save_photographs
from tests.eval.conftest import run, test, train

__all__ = ["photos", "run", "test", "train"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photographs(tmp_path / "photos")
