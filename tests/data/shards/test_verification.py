"""Opening a set of shards that has an index: cheap where nothing changed, thorough where something did."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from ssl_pipeline.data.shards import verification
from ssl_pipeline.data.shards.manifest import Manifest, ManifestShard, write_manifest
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.data.shards.verification import status_of
from ssl_pipeline.files import locked


def describe(folder: Path, class_names: tuple[str, ...] = ("a", "b", "c", "d")) -> None:
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
    listed = [ManifestShard(name, 0, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
    write_manifest(folder, Manifest(class_names, listed))


def refuse(*arguments: object, **options: object) -> None:
    raise AssertionError(f"called with {arguments}")


def test_a_start_without_changes_reads_names_and_times_alone(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe(shards)
    open_shards(shards)
    asked = []

    def count(path: str, *arguments: object, **options: object) -> os.stat_result:
        if str(path).endswith(".tar"):
            asked.append(path)
        return stat(path, *arguments, **options)

    stat = os.stat
    monkeypatch.setattr(os, "stat", count)
    for name in ("parse_manifest", "unchanged", "compare_with_manifest", "build_index", "write_catalogue", "locked"):
        monkeypatch.setattr(verification, name, refuse)
    monkeypatch.setattr("numpy.load", refuse)
    index = open_shards(shards)
    assert index.class_names == ("a", "b", "c", "d")
    assert sorted(asked) == ["part-000000.tar", "part-000001.tar", "part-000002.tar"]  # each once


def test_a_start_without_changes_waits_for_nobody(shards: Path) -> None:
    open_shards(shards)
    opened = threading.Thread(target=open_shards, args=(shards,), daemon=True)
    with locked(shards / ".index"):
        opened.start()
        opened.join(timeout=10)
        assert not opened.is_alive()


def test_another_manifest_is_compared_again(shards: Path) -> None:
    assert open_shards(shards).class_names is None
    describe(shards)
    assert open_shards(shards).class_names == ("a", "b", "c", "d")
    describe(shards, ("w", "x", "y", "z"))
    assert open_shards(shards).class_names == ("w", "x", "y", "z")
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][2]["sha256"] = "0" * 64
    (shards / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):  # a comparison that failed is not remembered as one that was made
        with pytest.raises(DataError, match=r"part-000002\.tar' is not the one that manifest\.json lists"):
            open_shards(shards)
    (shards / "manifest.json").unlink()
    assert open_shards(shards).class_names is None


def test_a_copy_with_new_times_is_verified_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_shards(shards)
    copy = shutil.copytree(shards, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(copy / "part-000001.tar", ns=(1, 1))
    open_shards(copy)
    monkeypatch.setattr(verification, "sha256_of", refuse)
    assert open_shards(copy).read(19).key == "0019"


def test_an_index_that_cannot_be_written_is_compared_each_time(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_shards(shards)
    describe(shards)
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    monkeypatch.setattr(verification, "write_catalogue", refuse)
    for _ in range(2):
        assert open_shards(shards).class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("slow", [0.0, 60.0])  # every file system is slow, or none
def test_the_status_of_files_comes_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, slow: float
) -> None:
    monkeypatch.setattr(verification, "STATUS_CHUNK", chunk)
    monkeypatch.setattr(verification, "SLOW_STATUS", slow)
    for number in range(5):
        (tmp_path / f"{number}").write_bytes(bytes(number))
        os.utime(tmp_path / f"{number}", ns=(0, 10**18 + number))
    sizes, times = status_of(tmp_path, [str(number) for number in (3, 1, 4, 0)])
    assert sizes.tolist() == [3, 1, 4, 0]
    assert times.tolist() == [10**18 + number for number in (3, 1, 4, 0)]
    with pytest.raises(FileNotFoundError):
        status_of(tmp_path, ["0", "nothing"])


def test_the_fingerprint_follows_the_content(shards: Path) -> None:
    before = open_shards(shards).fingerprint
    os.utime(shards / "part-000001.tar")
    assert open_shards(shards).fingerprint == before
    assert open_shards(shards / "part-00000[01].tar").fingerprint != before
