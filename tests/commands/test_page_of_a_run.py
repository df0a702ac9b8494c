"""A real run and its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_pipeline.commands import report
from ssl_pipeline.config import run_command
from ssl_pipeline.eval.report import ReportConfig
from tests.runs import command, rows, write_recipe
from tests.tiny import write_shards


def test_a_run_ends_by_naming_its_page_which_shows_what_it_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, run = write_shards(tmp_path / "shards"), tmp_path / "run"
    train = {"steps": 3, "save_every": 3, "log_every": 1, "hang_timeout": 0}
    spectrum = {"every": 2, "at_start": True}
    recipe = write_recipe(tmp_path / "tiny.yaml", "simclr", shards, train=train, spectrum=spectrum)
    with pytest.raises(SystemExit) as end:
        command([f"recipe={recipe}", f"output={run}"])
    assert end.value.code == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("As a page: "))
    assert line == f"As a page: python -m eval.report run={run}"
    assert run_command(ReportConfig, report.main, command="", argv=[line.rpartition(" ")[2]]) == 0
    page = (run / "report" / "index.html").read_text()
    start, *_, last = (row["rankme"] for row in rows(run) if "rankme" in row)
    for shown in ("loss", "learning rate", "done, step 3", "simclr", f"{start:.4g}", f"{last:.4g}", str(shards)):
        assert shown in page
