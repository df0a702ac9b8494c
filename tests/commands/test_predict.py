"""eval.predict: each row is the image that its key and its file say, with what the run's classifier says of it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_pipeline.backbones import save_classifier
from ssl_pipeline.commands.predict import PredictConfig, predict
from ssl_pipeline.config import run_command
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.features.classes import RunClassifierConfig, class_probabilities, open_classifier
from tests.commands.photographs import COLOURS


@pytest.fixture
def classifying(run: Path) -> Path:
    torch.manual_seed(4)
    save_classifier(run, nn.Linear(24, 2), ("cat", "été"))
    return run


def call(*arguments: str) -> int:
    return run_command(
        PredictConfig, predict, command="python -m eval.predict", argv=["workers=0", "batch_size=2", *arguments]
    )


def test_rows_lead_back_to_the_files(classifying: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "photos.csv"
    assert call(f"run={classifying}", f"source={photos}", f"output={output}") == 0
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("key", "sample_id", "file", "label", "name", "probability"),
        *("probability_cat", "probability_été"),
    ]
    assert sorted(row["file"] for row in rows) == sorted(COLOURS)
    assert [path.name for path in output.parent.iterdir()] == ["photos.csv"]
    (packed,) = (classifying / "eval/images").glob("photos-*/images")
    index = open_shards(packed)
    settings = RunClassifierConfig(run=classifying, workers=0)
    (expected,) = class_probabilities(open_classifier(settings), index, settings, description="images")
    for number, row in enumerate(rows):
        assert row["sample_id"] == str(number)
        assert row["key"] == index.key(number)
        assert [float(row["probability_cat"]), float(row["probability_été"])] == pytest.approx(
            expected[number].tolist()
        )
        assert float(row["probability"]) == pytest.approx(expected[number].max().item())
        assert row["name"] == ("cat", "été")[int(row["label"])] == ("cat", "été")[int(expected[number].argmax())]


def test_parquet_has_the_same(classifying: Path, test: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("a.csv", "a.parquet"):
        assert call(f"run={classifying}", f"source={test}", f"output={tmp_path / name}") == 0
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(found) == len(rows) == 31
    for as_text, values in zip(rows, found, strict=True):
        assert as_text["key"] == values["key"]
        assert int(as_text["label"]) == values["label"]
        assert float(as_text["probability_cat"]) == pytest.approx(values["probability_cat"], rel=1e-6)
        assert values["file"] is None  # these shards do not tell


def test_two_classes_of_one_name_are_told_apart_by_their_numbers(run: Path, test: str, tmp_path: Path) -> None:
    save_classifier(run, nn.Linear(24, 2), ("cat", "cat"))
    assert call(f"run={run}", f"source={test}", f"output={tmp_path / 'a.csv'}") == 0
    assert (
        (tmp_path / "a.csv").read_text(encoding="utf-8").split("\n")[0].rstrip().endswith("probability_0,probability_1")
    )


def test_a_file_that_is_there_is_kept(
    classifying: Path, test: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.csv"
    output.write_text("mine")
    assert call(f"run={classifying}", f"source={test}", f"output={output}") == 2
    assert "set overwrite=true" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert call(f"run={classifying}", f"source={test}", f"output={tmp_path / 'a.txt'}") == 2
    assert "output must end in .csv or .parquet" in capsys.readouterr().err
    (tmp_path / "readme.txt").write_text("no image")
    assert call(f"run={classifying}", f"source={tmp_path / 'readme.txt'}", f"output={tmp_path / 'b.csv'}") == 2
    assert "readme.txt is no image, zip or shard (.tar). Give one, or a folder of them." in capsys.readouterr().err
