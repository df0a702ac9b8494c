"""Features as a table: each row is the image that its key and its file say."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, load_backbone, save_backbone
from ssl_pipeline.commands.embed import EmbedConfig, embed
from ssl_pipeline.config import run_command
from ssl_pipeline.data.evaluation import EvaluationSet
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.features import rows
from tests.commands.photographs import COLOURS
from tests.ranks import run_on_ranks
from tests.tiny import write_shards

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def call(*arguments: str) -> int:
    return run_command(EmbedConfig, embed, command="python -m eval.embed", argv=["workers=0", *arguments], shared=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def table(path: Path) -> dict[str, list]:
    parquet = pytest.importorskip("pyarrow.parquet")
    return parquet.read_table(path).to_pydict()


def test_rows_lead_back_to_the_files(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "photos.parquet"
    assert call("backbone=raw_pixels", "size=2", f"source={photos}", f"output={output}") == 0
    written = f"3 rows of 12 features written to {output}; ssl_pipeline.embed names its rows by the column"
    assert capsys.readouterr().out.endswith(f"{written} file\n")
    shards = next((tmp_path / "cache/ssl_pipeline/images").rglob("*.tar")).parent
    again = ["backbone=raw_pixels", "size=2", f"output={output}", "overwrite=true"]
    assert call(*again, f"source={shards}") == 0
    assert capsys.readouterr().out.endswith(f"{written} key\n")
    found = table(output)
    assert list(found) == ["key", "sample_id", "file", "label", "name", *(f"feature_{number}" for number in range(12))]
    assert sorted(found["file"]) == sorted(COLOURS)
    assert found["sample_id"] == [0, 1, 2]
    for row, file in enumerate(found["file"]):
        red, green, blue = (np.float32(value / 255) for value in COLOURS[file])
        pixels = [found[f"feature_{number}"][row] for number in range(12)]
        np.testing.assert_allclose(pixels, [red] * 4 + [green] * 4 + [blue] * 4, rtol=1e-5)
        assert found["key"][row].startswith(f"{row:08d}-")
        assert found["name"][row] == file.split("/")[0]
        assert found["label"][row] == ["cat", "été"].index(found["name"][row])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["photos.parquet"]
    (place,) = (tmp_path / "cache/ssl_pipeline/images").iterdir()
    assert place.name.startswith("photos-")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_classes_have_their_names_and_an_image_beside_them_none(photos: Path, tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (9, 9)).save(photos / "beside.png")
    output = tmp_path / f"all{suffix}"
    assert call("backbone=raw_pixels", "size=2", f"source={photos}", f"output={output}") == 0
    if suffix == ".npz":
        with np.load(output, allow_pickle=False) as arrays:
            found = {name: arrays[name].tolist() for name in arrays}
    elif suffix == ".parquet":
        found = table(output)
    else:
        with output.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        found = {name: [row[name] for row in rows] for name in rows[0]}
    named = dict(zip(found["file"], found["name"], strict=True))
    of_none = None if suffix == ".parquet" else ""
    assert named == {name: name.split("/")[0] for name in COLOURS} | {"beside.png": of_none}


@pytest.mark.parametrize("name", ["white.png", "one photo.JPG", "blue.bmp"])
def test_one_image_is_one_row(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (20, 18), (255, 255, 255)).save(tmp_path / name)
    output = tmp_path / "one.csv"
    assert call("backbone=raw_pixels", "size=2", f"source={tmp_path / name}", f"output={output}") == 0
    with output.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["file"], row["label"]) == (name, "")
    assert [float(row[f"feature_{number}"]) for number in range(12)] == pytest.approx([1.0] * 12, abs=0.01)


def test_shards_are_read_as_they_are_and_rows_come_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "VALUES_PER_GROUP", 7 * 12)
    shards = write_shards(tmp_path / "shards")
    for name in ("a.parquet", "a.npz"):
        assert call("backbone=raw_pixels", "size=2", f"source={shards}", f"output={tmp_path / name}") == 0
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    assert list(found) == ["key", "sample_id", "file", "label", "features"]  # shards without names of classes
    assert found["features"].shape == (48, 12)
    assert found["key"].tolist() == [f"{number:04d}" for number in range(48)]
    assert found["label"].tolist() == [number % 3 for number in range(48)]
    for number in (0, 19, 20, 47):  # of all three shards
        pixels = EvaluationSet(open_shards(shards), 2)[number][0].flatten() / 255
        np.testing.assert_allclose(found["features"][number], pixels, rtol=1e-5)
    assert call("backbone=raw_pixels", "size=2", f"source={shards}", f"output={tmp_path / 'a.csv'}") == 0
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        text = list(csv.DictReader(file))
    assert [row["key"] for row in text] == found["key"].tolist()
    assert {(row["file"], row["label"]) for row in text} == {("", "0"), ("", "1"), ("", "2")}
    values = np.array([[row[f"feature_{number}"] for number in range(12)] for row in text]).astype(np.float32)
    np.testing.assert_array_equal(values, found["features"])
    as_table = table(tmp_path / "a.parquet")
    assert as_table["file"] == [None] * 48
    columns = np.array([as_table[f"feature_{number}"] for number in range(12)], dtype=np.float32)
    np.testing.assert_array_equal(columns.T, found["features"])
    import pyarrow.parquet

    assert pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 7  # of 7 rows, the last has 6
    assert not list(tmp_path.glob("*.cache"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    torch.manual_seed(0)
    backbone = create_backbone(BackboneConfig(name="vit_tiny_patch16_224", arguments=VIT))
    save_backbone(directory, backbone, Preprocessing(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    return directory


@pytest.mark.parametrize(("kind", "dim"), [("pooled", 24), ("class", 24), ("blocks", 48)])
def test_the_features_are_those_of_the_run(kind: str, dim: int, run: Path, photos: Path, tmp_path: Path) -> None:
    arguments = [f"run={run}", f"source={photos}", f"kind={kind}", "last_blocks=2"]
    assert call(*arguments, f"output={tmp_path / 'a.npz'}") == 0
    backbone, preprocessing = load_backbone(run)
    backbone.preprocessing = preprocessing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "photos", "run"]  # packed in the run
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found, torch.no_grad():
        images = torch.stack([backbone.transform()(Image.open(photos / file)) for file in found["file"]])
        assert found["features"].shape == (3, dim)
        if kind == "pooled":
            np.testing.assert_allclose(found["features"], backbone.eval()(images), rtol=1e-4, atol=1e-5)


def test_half_precision(run: Path, photos: Path, tmp_path: Path) -> None:
    assert call(f"run={run}", f"source={photos}", "dtype=float16", f"output={tmp_path / 'a.parquet'}") == 0
    pyarrow = pytest.importorskip("pyarrow.parquet")
    assert str(pyarrow.read_schema(tmp_path / "a.parquet").field("feature_23").type) == "halffloat"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["output=a.txt"], "output must end in .csv, .parquet or .npz. Got 'a.txt'"),
        (["output={there}"], "there.npz exists. Choose another name, or set overwrite=true"),
        (["output={there}/x.npz"], "x.npz cannot be written: '{there}' is a file, not a directory."),
        (["output={photos}.csv", "overwrite=true"], "photos.csv is a directory, but a file is needed."),
        (["output={new}", "kind=class"], "kind=class needs a network with tokens"),
        (["output={new}", "source=nowhere/"], "nowhere"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], sentence: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, new = tmp_path / "there.npz", tmp_path / "new.npz"
    there.touch()
    Path(f"{photos}.csv").mkdir()
    own = [argument.format(there=there, new=new, photos=photos) for argument in arguments]
    source = [] if any(argument.startswith("source") for argument in own) else [f"source={photos}"]
    assert call("backbone=raw_pixels", *source, *own) == 2
    assert sentence.format(there=there) in capsys.readouterr().err
    assert not new.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_folder_is_packed_once_and_a_changed_one_anew(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["backbone=raw_pixels", f"source={photos}", f"output={tmp_path / 'a.npz'}", "overwrite=true"]
    assert call(*arguments) == 0
    (shard,) = (tmp_path / "cache/ssl_pipeline/images").glob("photos-*/images/*.tar")
    packed = shard.stat().st_mtime_ns
    assert call(*arguments) == 0
    assert shard.stat().st_mtime_ns == packed
    Image.new("RGB", (9, 9)).save(photos / "cat" / "new.png")
    assert call(*arguments) == 0
    assert "1 new (cat/new.png). It is packed again." in capsys.readouterr().out
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert sorted(found["file"]) == sorted([*COLOURS, "cat/new.png"])


def on_a_rank(arguments: list[str]) -> int:
    return call(*arguments)


def test_several_processes_write_what_one_writes(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", (5,))
    arguments = ["backbone=raw_pixels", "size=2", f"source={shards}", "batch_size=2"]
    assert call(*arguments, f"output={tmp_path / 'one.npz'}") == 0
    codes = run_on_ranks(on_a_rank, [*arguments, f"output={tmp_path / 'two.npz'}"])
    assert codes == [0, 0]
    with np.load(tmp_path / "one.npz", allow_pickle=False) as one, np.load(tmp_path / "two.npz") as two:
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


def test_many_origins_are_those_of_each(photos: Path, tmp_path: Path) -> None:
    from ssl_pipeline.data.shards.origins import origin_of, origins_of
    from ssl_pipeline.packing.packed_once import pack_once

    index = open_shards(pack_once(str(photos), tmp_path / "packed"))
    keys = [index.key(sample) for sample in (0, 1, 2, 1, 0)] + ["none", "00000002-other", "00000009-far"]
    expected = [origin_of(index.folder, key) for key in keys]
    assert list(origins_of(index.folder, keys)) == expected
    assert expected[:3] == [index.origin(sample) for sample in range(3)]
    assert expected[5:] == [None, None, None]
    assert list(origins_of(tmp_path, keys)) == [None] * len(keys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_a_file_that_was_stopped(
    number: signal.Signals, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(folder: Path, *_: object, **__: object) -> None:
        folder.mkdir()
        (folder / "features.tmp").touch()
        signal.raise_signal(number)

    monkeypatch.setattr("ssl_pipeline.commands.embed.engine_pass", stopped)
    output = tmp_path / "out" / "a.npz"
    assert call("backbone=raw_pixels", "size=16", f"source={photos}", f"output={output}") == 128 + number
    assert not list(output.parent.iterdir())
