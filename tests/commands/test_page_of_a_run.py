"""A real run and its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_pipeline.commands import pages_on_the_way, report
from ssl_pipeline.config import run_command
from ssl_pipeline.eval.report import ReportConfig
from ssl_pipeline.packing.packed_once import pack_once
from tests.runs import _pretrain, command, losses, rows, write_recipe
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
    for shown in ("loss", "learning rate", "done, step 3", "simclr", f"{start:.4g}", f"{last:.4g}", shards.name):
        assert shown in page


@pytest.mark.slow
def test_a_run_writes_its_page_at_checkpoints_and_at_its_end(tmp_path: Path) -> None:
    shards, run = write_shards(tmp_path / "shards"), tmp_path / "run"
    train = {"steps": 4, "save_every": 2, "log_every": 1, "hang_timeout": 0}
    recipe = write_recipe(tmp_path / "tiny.yaml", "simclr", shards, train=train)
    assert _pretrain([f"recipe={recipe}", f"output={run}", "report=true"]) == 0
    page = (run / "report" / "index.html").read_text()
    assert "done, step 4" in page
    assert "Map of the embeddings" in page
    events = EventAccumulator(str(run / "report"))
    events.Reload()
    assert events.Tags()["images"] == ["views", "neighbours"]
    assert [image.step for image in events.Images("neighbours")][-1] == 4


@pytest.fixture
def of_photos(tmp_path: Path, photos: Path) -> list[str]:
    """A run of a folder, without what is asked for."""
    train = {"steps": 2, "save_every": 1, "log_every": 1, "hang_timeout": 0}
    recipe = write_recipe(tmp_path / "tiny.yaml", "simclr", tmp_path, train=train)
    return [
        f"recipe={recipe}",
        f"data.shards={pack_once(str(photos), tmp_path)}",
        f"images={photos}",
        "data.batch_size=2",
    ]


@pytest.mark.slow
def test_a_run_of_a_folder_ends_with_its_page_and_names_it(
    tmp_path: Path, of_photos: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, writers = tmp_path / "a run, mine", []
    real = subprocess.Popen
    monkeypatch.setattr(
        pages_on_the_way.subprocess,
        "Popen",
        lambda command, **rest: (writers.append(command), real(command, **rest))[1],
    )
    for _ in range(2):  # the second one finds the run complete, and its page there
        assert _pretrain([*of_photos, f"output={run}"]) == 0
        assert len([command for command in writers if pages_on_the_way.WRITER in command]) == 1
        page = run / "report" / "index.html"
        assert f"\nAs a page: {page}\n" in capsys.readouterr().out
        assert "done, step 2" in page.read_text()
    page.unlink()
    assert _pretrain([*of_photos, f"output={run}"]) == 0
    assert page.is_file()


@pytest.mark.other
@pytest.mark.parametrize("given", ["report=false", "find_lr=true"])
def test_no_page_is_written_where_none_is_wanted(
    tmp_path: Path,
    of_photos: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: str,
) -> None:
    monkeypatch.setattr(pages_on_the_way.PagesOnTheWay, "_start", Mock(side_effect=AssertionError))
    assert _pretrain([*of_photos, f"output={tmp_path / 'run'}", given]) == 0
    named = "As a page: python -m eval.report run=" in capsys.readouterr().out
    assert named == (given == "report=false")


@pytest.mark.other
def test_a_page_that_fails_is_said_and_costs_the_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages_on_the_way, "WRITER", "no.such.module")
    shards, runs = write_shards(tmp_path / "shards"), {}
    for wanted in ("true", "false"):
        run = tmp_path / wanted
        recipe = write_recipe(tmp_path / "tiny.yaml", "simclr", shards)
        assert _pretrain([f"recipe={recipe}", f"output={run}", f"report={wanted}"]) == 0
        runs[wanted] = losses(run)
    assert runs["true"] == runs["false"]
    said = capsys.readouterr()
    assert "The page of the run is skipped: " in said.err
    assert said.out.count("As a page: python -m eval.report run=") == 2
    assert not (tmp_path / "true" / "report").exists()


def test_a_page_that_takes_too_long_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **rest: real([sys.executable, "-c", "import time; time.sleep(60)"], **rest)
    )
    monkeypatch.setattr(pages_on_the_way, "SECONDS_AT_THE_END", 0.1)
    assert pages_on_the_way.PagesOnTheWay(tmp_path).finish(is_new=True) is None
    assert "skipped: it is not finished after" in capsys.readouterr().err


def test_a_page_on_the_way_does_not_wait_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    real = subprocess.Popen

    def start(command: list[str], **settings: object) -> subprocess.Popen:
        started.append(command)
        return real([sys.executable, "-c", "import time; time.sleep(60)"], **settings)

    monkeypatch.setattr(subprocess, "Popen", start)
    pages = pages_on_the_way.PagesOnTheWay(tmp_path)
    pages()
    pages()
    assert len(started) == 1
    pages.stop()
    pages()
    assert len(started) == 2
    pages.stop()
