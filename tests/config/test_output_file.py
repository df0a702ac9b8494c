"""Files that commands write: of known kinds, and none is replaced by mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_pipeline.commands.curate import CurateConfig
from ssl_pipeline.commands.deduplicate import DeduplicateConfig
from ssl_pipeline.commands.embed import WRITERS as EMBED_WRITERS
from ssl_pipeline.commands.embed import EmbedConfig
from ssl_pipeline.commands.predict import WRITERS as PREDICT_WRITERS
from ssl_pipeline.commands.predict import PredictConfig
from ssl_pipeline.config import Config, ConfigError, load
from ssl_pipeline.config.output_file import OutputFile, require_writable
from ssl_pipeline.data_tools.pseudo_label import PseudoLabelImages, keep_file
from ssl_pipeline.eval.dense import DenseConfig
from ssl_pipeline.eval.export import ExportConfig
from ssl_pipeline.eval.images import run_evaluator
from ssl_pipeline.eval.knn import KnnConfig
from ssl_pipeline.packing.make_shards import MakeShards

OWN = {
    EmbedConfig: ["backbone=raw_pixels", "source=a"],
    PredictConfig: ["run=a", "source=a"],
    CurateConfig: ["backbone=raw_pixels", "shards=a", "clusters=3", "images=3"],
    DeduplicateConfig: ["backbone=raw_pixels", "shards=a", "threshold=0.9"],
    PseudoLabelImages: ["run=a", "shards=a"],
}


@pytest.mark.parametrize("schema", OWN)
def test_one_way_for_all_commands(schema: type[OutputFile], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^output must end in .*{schema.suffixes[-1]}\. Got 'a\.txt'"):
        load(schema, [*OWN[schema], "output=a.txt"])
    output = tmp_path / "deep" / "er" / f"a{schema.suffixes[0]}"
    settings = load(schema, [*OWN[schema], f"output={output}"])
    settings.begin_output()
    output.touch()
    with pytest.raises(ConfigError, match=r"^output=.* exists\. Choose another name, or set overwrite=true\.$"):
        settings.begin_output()
    load(schema, [*OWN[schema], f"output={output}", "overwrite=true"]).begin_output()


def test_the_kinds_are_those_that_are_written() -> None:
    assert EmbedConfig.suffixes == tuple(EMBED_WRITERS)
    assert PredictConfig.suffixes == tuple(PREDICT_WRITERS)


def test_a_file_beside_it_stays_too(tmp_path: Path) -> None:
    settings = PseudoLabelImages(run=tmp_path, shards="a", output=tmp_path / "labels.npy")
    keep_file(settings.output).touch()
    with pytest.raises(ConfigError, match=r"labels\.keep\.npy exists"):
        settings.begin_output()


FOLDERS = {
    KnnConfig: ["backbone=raw_pixels", "train=a", "test=b"],
    DenseConfig: ["backbone=raw_pixels", "source=a"],
    ExportConfig: ["run=a"],
    MakeShards: ["source=digits"],
}


@pytest.mark.parametrize("schema", FOLDERS)
def test_a_folder_is_no_file(schema: type[Config], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = {"x.json": "must be a directory, in which files get their own names. Got the name of a file, 'x.json'"}
    if schema is not MakeShards:  # which says the same in its own words
        refused |= {name: rf"must be a directory\. '{tmp_path}/file' is a file" for name in ("file", "file/below")}
    for name, sentence in refused.items():
        with pytest.raises(ConfigError, match=f"^output {sentence}"):
            load(schema, [*FOLDERS[schema], f"output={tmp_path / name}"])
    (tmp_path / "data.zip").mkdir()
    for name in ("new", "resnet18.a1_in1k", "data.zip"):
        assert load(schema, [*FOLDERS[schema], f"output={tmp_path / name}"]).output == tmp_path / name
    assert schema is not KnnConfig or load(schema, FOLDERS[schema]).output is None


@pytest.mark.parametrize("place", ["", "deep/er/"])
def test_a_place_where_no_file_can_be_made_is_refused_by_its_own_name(place: str, tmp_path: Path) -> None:
    output = f"/proc/{place}a.npz"
    settings = load(EmbedConfig, [*OWN[EmbedConfig], f"output={output}"])
    with pytest.raises(ConfigError) as refused:
        settings.begin_output()
    assert str(refused.value) == (
        f"output={output} cannot be written: no file can be made in '/proc' (No such file or directory). Choose a "
        "place that can be written."
    )
    require_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir()), "nothing is left of the attempt"


def test_evaluators_refuse_it_before_they_read_anything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["run=gone", "train=gone", "test=gone", "output=/proc/a"]
    monkeypatch.setattr("sys.argv", ["eval.knn", *argv])
    assert run_evaluator(KnnConfig, lambda config: None, command="") == 2
    assert capsys.readouterr().err.startswith("error: /proc/a/eval cannot be written: no file can be made in '/proc'")
