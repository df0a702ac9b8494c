"""What `data.shards=` takes: directories, files, patterns, braces, lists, the home directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_pipeline.config import load
from ssl_pipeline.data.shards.listing import list_shards, shards_may_be_at
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.data.stream import DataConfig, open_images

WriteTar = Callable[..., Path]


def counts(source: object) -> list[int]:
    return open_shards(source).shard_counts.tolist()


def test_files_braces_and_lists(shards: Path) -> None:
    assert counts(shards / "part-000001.tar") == [5]
    assert counts(f"{shards}/part-{{000000..000001}}.tar") == [7, 5]
    assert counts(f"{shards}/part-00000{{0,2}}.tar") == [7, 8]
    assert counts(f"{shards}/{{part,part}}-00000{{0,2}}.tar") == [7, 8]  # each shard once
    assert counts([f"{shards}/part-000002.tar", f"{shards}/part-000000.tar"]) == [7, 8]  # in the order of their names
    assert counts([str(shards)]) == counts((f"{shards}/part-*1.tar", str(shards))) == [7, 5, 8]
    assert open_shards([f"{shards}/part-000002.tar", f"{shards}/part-000000.tar"]).key(7) == "0012"


@pytest.mark.parametrize("name", ["com,ma", "[set]", "{a,b}", "{a"])
def test_a_place_that_there_is_is_one_whatever_its_letters(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / name
    shutil.copytree(shards, folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for text in (str(folder), f"~/{name}", name, f"{folder}/part-000001.tar"):
        read = load(DataConfig, [f"shards={text}", "batch_size=2"]).shards
        assert read == text
        assert counts(read) == ([5] if text.endswith(".tar") else [7, 5, 8])


def test_patterns_in_a_folder_with_a_comma(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "com,ma")
    for pattern, found in (("part-*1.tar", [5]), ("part-{000000..000001}.tar", [7, 5])):
        assert counts(load(DataConfig, [f"shards={tmp_path}/com,ma/{pattern}", "batch_size=2"]).shards) == found
    two = load(DataConfig, [f"shards={shards}/part-000000.tar,{shards}/part-000001.tar", "batch_size=2"]).shards
    assert counts(two) == [7, 5], "between commas there are two"


def test_braces_may_be_longer_than_a_path(shards: Path) -> None:
    names = ",".join(f"part-{number:06d}" for number in (0, 2) for _ in range(400))
    assert counts(f"{shards}/{{{names}}}.tar") == [7, 8]


def test_the_home_directory(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shards.parent))
    assert counts("~/shards") == [7, 5, 8]
    assert counts("~/shards/part-{000001..000002}.tar") == [5, 8]
    assert not (Path.cwd() / "~").exists()


def test_several_folders_are_one_set(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = tmp_path / "other" / "deep"
    shutil.copytree(shards, other)
    (other / "part-000001.tar").unlink()
    both = [str(shards), str(other)]
    for _ in ("made", "read again"):
        index = open_shards(both)
        assert index.shard_counts.tolist() == [7, 8, 7, 5, 8]
        assert index.key(7) == index.key(27) == "0012"
        assert index.read(15 + 7).shard == "shards/part-000001.tar"
        assert index.labels().tolist()[:7] == [0, 1, 2, 3, 0, 1, 2]
    assert not list(tmp_path.glob(".index*"))  # nothing is written into a folder that was not named
    assert len(list((tmp_path / "cache" / "ssl_pipeline").glob("*/index.json"))) == 1


def test_the_manifests_of_several_folders_count(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = shutil.copytree(shards, tmp_path / "other")
    for folder, names in ((shards, ["a", "b"]), (other, ["a", "b"])):
        (folder / "manifest.json").write_text(json.dumps({"class_names": names, "shards": []}))
    both = [f"{shards}/*.tar", f"{other}/part-000001.tar"]
    assert open_shards(both).class_names == ("a", "b")
    (other / "manifest.json").write_text(json.dumps({"class_names": ["b", "a"], "shards": []}))
    with pytest.raises(DataError, match="' has other class names than the other shards"):
        open_shards(both)
    listed = [{"name": "part-000001.tar", "samples": 5, "bytes": 1, "sha256": "0" * 64}]
    (other / "manifest.json").write_text(json.dumps({"class_names": ["a", "b"], "shards": listed}))
    with pytest.raises(DataError, match=r"other/part-000001\.tar' is not the one that manifest\.json lists"):
        open_shards(both)


def test_the_command_line_takes_them(shards: Path) -> None:
    for text, expected in (
        (f"[{shards}/part-000000.tar,{shards}/part-000002.tar]", [7, 8]),
        (f"{shards}/part-{{000001..000002}}.tar", [5, 8]),
        (str(shards), [7, 5, 8]),
    ):
        config = load(DataConfig, [f"shards={text}", "batch_size=2"], command="test")
        assert open_images(config).shard_counts.tolist() == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "The list of shards is empty"),
        ("{3..1}.tar", "must count upwards"),
        ("{0..99999999}.tar", r"to at most 1,000,000 shards"),
        ("{a}.tar", r"has braces that are neither \{000\.\.099\} nor \{a,b\}"),
        ("part-{000000..000003}.tar", r"There is no directory or file '.*part-000003\.tar'\. Needed: a directory of"),
        (["part-000000.tar", "other"], "There is no directory or file '.*other'"),
        (["part-000000.tar", "s3://bucket/x"], "'s3://bucket/x' must be the only entry"),
        ("..", r"holds no \.tar shard\. There are some in '.*shards'"),
    ],
)
def test_what_is_not_there_is_named(
    shards: Path, source: str | list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards)
    with pytest.raises(DataError, match=message):
        open_shards(source)


@pytest.mark.parametrize(("name", "what"), [("one.JPG", "an image"), ("photos.zip", "a zip")])
def test_a_photograph_is_no_shard(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_bytes(b"...")
    with pytest.raises(DataError, match=rf"{name}' is {what}, but shards are needed here"):
        list_shards(tmp_path / name)


def test_a_name_with_braces_that_is_there_is_taken(tmp_path: Path, shards: Path) -> None:
    (shards / "part-000000.tar").rename(shards / "a{1,2}.tar")
    assert list_shards(shards / "a{1,2}.tar").names == ["a{1,2}.tar"]


@pytest.mark.parametrize(
    ("source", "there"),
    [
        ("{shards}", True),
        ("{shards}/part-*.tar", True),
        ("{shards}/part-{{0..2}}.tar", True),
        ("{shards}/part-{{0..3}}.tar", False),
        ("{shards}/other-*.tar", False),
        ("{empty}", False),
        ("{empty}/none", False),
        ("s3://bucket/photos", True),
        ("", False),
    ],
)
def test_whether_there_are_shards(tmp_path, source, there):
    (tmp_path / "empty").mkdir()
    (tmp_path / "shards").mkdir()
    for number in range(3):
        (tmp_path / "shards" / f"part-{number}.tar").touch()
    place = source.format(shards=tmp_path / "shards", empty=tmp_path / "empty")
    assert shards_may_be_at(place) == there
    assert shards_may_be_at([str(tmp_path / "shards"), place]) == there
    assert not shards_may_be_at(None)
