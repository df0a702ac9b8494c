import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssl_pipeline.data.shards.open import DataError, open_shards

Encoded = Callable[..., bytes]
WriteTar = Callable[..., Path]


def test_samples_are_read_by_number(shards: Path, encoded: Encoded) -> None:
    index = open_shards(shards)
    assert len(index) == 20
    assert index.shard_counts.tolist() == [7, 5, 8]
    assert index.has_labels
    assert index.class_names is None
    for number in range(20):
        sample = index.read(number)
        assert (sample.image, sample.label, sample.key) == (encoded(number), number % 4, f"{number:04d}")
    with tarfile.open(shards / "part-000001.tar") as archive:
        byte = archive.getmember("0008.jpg").offset_data
    assert index.read(8).location == f"part-000001.tar, key '0008', byte {byte}"
    with pytest.raises(IndexError, match=r"\[0, 20\)"):
        index.read(20)


def test_the_index_is_made_once_and_used_again(shards: Path) -> None:
    open_shards(shards)
    made = (shards / ".index" / "index.json").stat().st_mtime_ns
    assert sorted(path.name for path in (shards / ".index").iterdir()) == [
        "index.json",
        "part-000000.tar.npy",
        "part-000001.tar.npy",
        "part-000002.tar.npy",
    ]
    assert open_shards(str(shards)).read(19).label == 3
    assert (shards / ".index" / "index.json").stat().st_mtime_ns == made


def test_a_pattern_takes_part_of_a_directory(shards: Path) -> None:
    assert len(open_shards(shards / "part-00000[12].tar")) == 13
    assert len(open_shards(shards)) == 20
    assert len(open_shards(f"{shards}/part-00000[12].tar")) == 13


def test_an_index_can_be_sent_to_a_worker(shards: Path) -> None:
    index = open_shards(shards)
    index.read(3)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read(3).image == index.read(3).image
    assert len(pickle.dumps(index)) < 3000  # no keys, no offsets, no open files


def test_few_shards_are_open_at_a_time(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pipeline.data.shards.opened.OPEN_SHARDS", 2)
    index = open_shards(shards)
    assert [index.read(number).label for number in (0, 8, 19, 1, 9)] == [0, 0, 3, 1, 1]
    assert len(index._shards.files) == len(index._shards.mapped) == 2


def test_rows_are_mapped_and_only_of_open_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pipeline.data.shards.opened.OPEN_SHARDS", 2)
    index = open_shards(shards)
    assert not index._shards.mapped
    for number in range(20):
        index.read(number)
    assert [type(rows.base) for rows in index._shards.mapped.values()] == [np.memmap, np.memmap]


def test_a_read_only_directory_is_indexed_in_the_cache(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def refuse(path: Path, *arguments: object, **options: object) -> None:
        if shards in path.parents:
            raise PermissionError(13, "Permission denied")
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_shards(shards).read(5).label == 1
    assert not (shards / ".index").exists()
    assert len(list((tmp_path / "cache" / "ssl_pipeline").glob("shards-*/index.json"))) == 1
    assert open_shards(shards).read(5).label == 1


def test_no_place_for_the_index_is_an_error(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    with pytest.raises(DataError, match="Set XDG_CACHE_HOME"):
        open_shards(shards)


def test_missing_and_empty_directories_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no directory"):
        open_shards(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"holds no \.tar shard"):
        open_shards(tmp_path)
    with pytest.raises(DataError, match=r"holds no \.tar shard"):
        open_shards(tmp_path / "train-*.tar")
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(DataError, match=r"'a\.tar\.gz' is compressed: unpack it first"):
        open_shards(tmp_path)


def test_shards_without_samples_are_an_error(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(DataError, match="holds 1 shard but no sample"):
        open_shards(tmp_path)


def test_an_empty_shard_among_others_is_fine(shards: Path, write_tar: WriteTar) -> None:
    write_tar(shards / "part-000001b.tar", {})
    index = open_shards(shards)
    assert index.shard_counts.tolist() == [7, 5, 0, 8]
    assert index.read(12).key == "0012"


def test_a_truncated_shard_is_named_with_its_byte(shards: Path) -> None:
    shard = shards / "part-000001.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as archive:
        boundary = archive.getmember("0008.jpg").offset
    for length in (boundary, boundary + 600, 0):  # between two members, within one, nothing at all
        shard.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"Shard 'part-000001\.tar' is (truncated: .* byte \d+|empty)"):
            open_shards(shards)
    shard.write_bytes(whole)
    assert len(open_shards(shards)) == 20  # mended: nothing is left of the failures


def test_a_shard_that_changed_since_is_an_error(shards: Path) -> None:
    open_shards(shards)
    shard = shards / "part-000002.tar"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)  # the same size
    with pytest.raises(DataError, match=r"part-000002\.tar' changed since it was indexed.*delete '.*\.index'"):
        open_shards(shards)
    shard.write_bytes(bytes(content) + bytes(512))
    with pytest.raises(DataError, match="changed since it was indexed"):
        open_shards(shards)
    shutil.rmtree(shards / ".index")
    assert len(open_shards(shards)) == 20


def test_a_shard_that_changes_while_it_is_read_is_an_error(shards: Path) -> None:
    index = open_shards(shards)
    index.read(0)
    for number in range(2):
        shard = shards / f"part-00000{number}.tar"
        os.truncate(shard, 600)
    with pytest.raises(DataError, match="changed since it was indexed"):
        index.read(6)
    with pytest.raises(DataError, match="changed since it was indexed"):
        index.read(7)
    (shards / "part-000002.tar").unlink()
    with pytest.raises(DataError, match=r"Cannot open shard .*part-000002\.tar': No such file"):
        index.read(15)


def test_a_copy_with_new_times_is_no_change(shards: Path, tmp_path: Path) -> None:
    open_shards(shards)
    copy = shutil.copytree(shards, tmp_path / "copy", copy_function=shutil.copyfile)
    later = time.time() + 100
    for shard in copy.glob("*.tar"):
        os.utime(shard, (later, later))
    assert len(open_shards(copy)) == 20
    columns = json.loads((copy / ".index" / "index.json").read_text())["shards"]
    assert columns["modified_ns"] == [path.stat().st_mtime_ns for path in sorted(copy.glob("*.tar"))]


def test_shards_that_came_or_went_are_errors(shards: Path, write_tar: WriteTar, encoded: Encoded) -> None:
    open_shards(shards)
    write_tar(shards / "part-000003.tar", {"a.jpg": encoded(1)})
    with pytest.raises(DataError, match=r"'part-000003\.tar' was added after .* Delete that directory"):
        open_shards(shards)
    (shards / "part-000003.tar").unlink()
    (shards / "part-000000.tar").unlink()
    with pytest.raises(DataError, match=r"'part-000000\.tar' is missing"):
        open_shards(shards)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 99}', '{"format": 5, "shards": [{}]}', '{"format": 5, "shards": {"name": ["a.tar"]}}'],
)
def test_a_damaged_index_is_an_error(shards: Path, content: str) -> None:
    open_shards(shards)
    (shards / ".index" / "index.json").write_text(content)
    with pytest.raises(DataError, match=r"(damaged|another format)\. Delete it"):
        open_shards(shards)


def spoil(path: Path, how: str) -> None:
    content = json.loads(path.read_text())
    columns = content["shards"]
    if how == "deep":
        path.write_text("[" * 200_000)
        return
    if how == "directory":
        path.unlink()
        path.mkdir()
        return
    if how == "names":
        content["class_names"] = "abc"
    elif how == "fraction":
        columns["samples"][0] = 1.5
    elif how == "negative":
        columns["bytes"][1] = -1
    elif how == "huge":
        columns["widest"][2] = 2**70
    elif how == "nested":
        columns["samples"] = [[1], [2], [3]]
    else:
        columns["labelled"][0] = True
        columns["labelled"][1] = "7"
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("how", ["deep", "directory", "names", "fraction", "negative", "huge", "nested", "kinds"])
def test_a_damaged_index_is_named_whatever_the_damage(shards: Path, how: str) -> None:
    open_shards(shards)
    spoil(shards / ".index" / "index.json", how)
    with pytest.raises(
        DataError, match=r"The index '.*\.index' (is damaged\. Delete it|cannot be read: Is a directory)"
    ):
        open_shards(shards)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"class_names": "abc", "shards": []}',
        *(
            json.dumps(
                {"class_names": None, "shards": [{"name": "a.tar", "samples": 1, "bytes": 1, "sha256": ""} | wrong]}
            )
            for wrong in (
                {"name": ["a"]},
                {"name": 3},
                {"bytes": "1"},
                {"bytes": -1},
                {"samples": True},
                {"sha256": None},
            )
        ),
        json.dumps({"class_names": None, "shards": [{"name": "a", "samples": 1, "bytes": 1, "sha256": ""}] * 2}),
    ],
)
def test_a_damaged_manifest_is_named(shards: Path, content: str) -> None:
    (shards / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json' is (damaged|not valid JSON).* Copy it again, or delete it"):
        open_shards(shards)


def test_a_manifest_that_cannot_be_read_is_named(shards: Path) -> None:
    (shards / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json' cannot be read: Is a directory"):
        open_shards(shards)


def test_damaged_rows_are_an_error(shards: Path) -> None:
    index = open_shards(shards)
    path = shards / ".index" / "part-000000.tar.npy"
    np.save(path, np.full((7, 6), 2**60))
    with pytest.raises(DataError, match=r"index of shard .* is damaged"):
        index.read(0)
    header = b"\x93NUMPY\x01\0v\0" + b"(" * 117 + b"\n"
    for damage in (b"", b"garbage", pickle.dumps([1]), header, header.replace(b"(((", b"0x\0"), b"PK\3\4" + bytes(50)):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="is damaged"):
            open_shards(shards).read(0)


def test_several_processes_can_open_new_shards_at_once(shards: Path) -> None:
    command = (
        "import sys; from ssl_pipeline.data.shards.open import open_shards; "
        f"index = open_shards({str(shards)!r}); assert index.read(19).key == '0019'; print(len(index))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0].split() for process in processes] == [[b"20"]] * 3
    assert not list((shards / ".index").glob("*.tmp"))


def one_shard(folder: Path, write_tar: WriteTar, members: dict[str, bytes]) -> Path:
    return write_tar(folder / "a.tar", members).parent


def test_shards_in_the_style_of_img2dataset(tmp_path: Path, write_tar: WriteTar, encoded: Encoded) -> None:
    members = {}
    for number in range(3):
        members[f"00000000{number}.jpg"] = encoded(number)
        members[f"00000000{number}.json"] = json.dumps(
            {"key": str(number), "caption": "cls 7", "status": "ok"}
        ).encode()
        members[f"00000000{number}.txt"] = b"a caption"
    index = open_shards(one_shard(tmp_path, write_tar, members))
    assert [index.read(number).label for number in range(3)] == [None] * 3
    assert not index.has_labels


def test_labels_come_from_cls_or_json(tmp_path: Path, write_tar: WriteTar, encoded: Encoded) -> None:
    members = {
        "n01/a.JPEG": encoded(0),
        "n01/a.json": b'{"label": 4}',
        "n01/b.cls": b" 5\n",
        "n01/b.json": b"not json, and not needed",
        "n01/b.Png": encoded(1, format="PNG"),
        "c.webp": encoded(2, format="WEBP"),
        "c.json": b'{"cls": 6, "label": "six"}',
        "d.jpg": encoded(3),
        "d.cls": b"-1",
        "e.jpg": encoded(4),
        "e.json": b"[1, 2]",
        "f.jpg": encoded(5),
        "f.json": b'{"label": true}',
    }
    index = open_shards(one_shard(tmp_path, write_tar, members))
    samples = [index.read(number) for number in range(6)]
    assert [sample.label for sample in samples] == [4, 5, 6, None, None, None]
    assert [sample.key for sample in samples] == ["n01/a", "n01/b", "c", "d", "e", "f"]
    assert samples[1].image == encoded(1, format="PNG")


def test_what_is_no_sample_is_ignored(tmp_path: Path, write_tar: WriteTar, encoded: Encoded) -> None:
    hostile = b"cos\nsystem\n(S'touch /tmp/owned'\ntR."
    members = {
        "README": b"text",
        ".DS_Store": b"1",
        "._a.jpg": b"1",
        "__meta__.json": b"{}",
        "/etc/passwd.jpg": encoded(0),
        "/etc/passwd.pyd": hostile,
        "/etc/passwd.pkl": hostile,
        "../../b.jpg": encoded(1),
        "../../b.seg.png": encoded(2),
    }
    index = open_shards(one_shard(tmp_path, write_tar, members))
    assert [index.read(number).key for number in range(2)] == ["/etc/passwd", "../../b"]
    assert [index.read(number).image for number in range(2)] == [encoded(0), encoded(1)]


def test_keys_are_found_again_behind_long_names(tmp_path: Path, write_tar: WriteTar, encoded: Encoded) -> None:
    names = ["x" * 300, "ü" * 80, "plain"]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        folder = tmp_path / str(format)
        folder.mkdir()
        write_tar(folder / "a.tar", {f"{name}.jpg": encoded(0) for name in names}, format=format)
        index = open_shards(folder)
        assert [index.read(number).key for number in range(3)] == names


def manifest_for(shards: Path) -> dict[str, object]:
    open_shards(shards)
    columns = json.loads((shards / ".index" / "index.json").read_text())["shards"]
    names = ("name", "samples", "bytes", "sha256")
    listed = [dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)]
    return {"class_names": ["a", "b", "c", "d"], "shards": listed}


def test_class_names_come_from_the_manifest(shards: Path) -> None:
    (shards / "manifest.json").write_text(json.dumps(manifest_for(shards)))
    assert open_shards(shards).class_names == ("a", "b", "c", "d")


def test_shards_must_be_those_of_the_manifest(shards: Path) -> None:
    manifest = manifest_for(shards)
    manifest["shards"][1]["sha256"] = "0" * 64
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"part-000001\.tar' is not the one that manifest\.json lists"):
        open_shards(shards)


def test_a_shard_that_was_not_copied_is_missed(shards: Path) -> None:
    (shards / "manifest.json").write_text(json.dumps(manifest_for(shards)))
    shutil.rmtree(shards / ".index")
    (shards / "part-000001.tar").unlink()
    with pytest.raises(DataError, match=r"'part-000001\.tar' is in manifest\.json but not in"):
        open_shards(shards)
    assert len(open_shards(shards / "part-000002.tar*")) == 8  # a pattern asks for a part


def test_a_foreign_manifest_is_ignored_and_a_torn_one_refused(shards: Path) -> None:
    (shards / "manifest.json").write_text('{"shards": "elsewhere"}')
    assert open_shards(shards).class_names is None
    (shards / "manifest.json").write_text('{"shards": [')
    with pytest.raises(DataError, match="is not valid JSON"):
        open_shards(shards)


# sizes


def test_sizes_are_those_of_the_decoded_images(tmp_path: Path, write_tar: WriteTar, encoded: Encoded) -> None:
    sizes = [(12, 10), (30, 7), (9, 40), (16, 16)]  # (width, height)
    files = {
        f"{number}.{ext}": encoded(number, size=size, format=format)
        for number, (size, ext, format) in enumerate(
            zip(sizes, ("jpg", "png", "webp", "jpg"), ("JPEG", "PNG", "WEBP", "JPEG"), strict=True)
        )
    }
    write_tar(tmp_path / "a.tar", dict(list(files.items())[:3]))
    write_tar(tmp_path / "b.tar", {})
    write_tar(tmp_path / "c.tar", dict(list(files.items())[3:]) | {"9.jpg": b"no image"})
    index = open_shards(tmp_path)
    expected = [[height, width] for width, height in sizes] + [[0, 0]]
    assert index.sizes().tolist() == expected
    assert index.sizes([3, 0, 4, 0, 2]).tolist() == [expected[number] for number in (3, 0, 4, 0, 2)]
    assert index.sizes([]).shape == (0, 2)
    assert index.shard_pixel_bytes.tolist() == [3 * (12 * 10 + 30 * 7 + 9 * 40), 0, 3 * 16 * 16]
    assert index.widest == 30
    assert index.image_bytes == sum(len(data) for data in files.values()) + len(b"no image")


def test_sizes_touch_no_shard(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_shards(shards)
    for shard in shards.glob("*.tar"):
        shard.unlink()
    assert index.sizes().tolist() == index.sizes(range(20)).tolist() == [[10, 12]] * 20


def test_an_image_beyond_the_largest_size_has_none(
    tmp_path: Path, write_tar: WriteTar, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_pipeline.data.decode.MAX_PIXELS", 1000)
    write_tar(tmp_path / "a.tar", {"a.png": encoded(0, size=(40, 40), format="PNG"), "b.jpg": encoded(0)})
    assert open_shards(tmp_path).sizes().tolist() == [[0, 0], [10, 12]]


# indexes of earlier formats


def as_earlier_format(place: Path, format: int) -> None:
    """The index as that format had it: fewer columns of shards and of rows."""
    path = place / "index.json"
    content = json.loads(path.read_text())
    columns = {name: content["shards"][name] for name in ("name", "bytes", "modified_ns", "sha256", "samples")}
    columns["labelled"] = content["shards"]["labelled"]
    if format == 1:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text(json.dumps({"format": 1, "shards": rows}))
    elif format in (3, 4):
        path.write_text(json.dumps(content | {"format": format}))
        return
    else:
        path.write_text(json.dumps(content | {"format": 2, "shards": columns}))
    for rows in place.glob("*.npy"):
        np.save(rows, np.load(rows, allow_pickle=False)[:, :4], allow_pickle=False)


@pytest.mark.parametrize("format", [1, 2, 3, 4])
def test_an_index_of_an_earlier_format_is_made_again(
    shards: Path, format: int, caplog: pytest.LogCaptureFixture
) -> None:
    index = open_shards(shards)
    as_earlier_format(shards / ".index", format)
    assert not caplog.records
    again = open_shards(shards)
    assert (len(again), again.fingerprint, again.read(19).label) == (20, index.fingerprint, 3)
    assert again.sizes().tolist() == [[10, 12]] * 20
    (line,) = caplog.messages
    assert line.endswith("/.index' is from an earlier version and is rebuilt.")
    open_shards(shards)
    assert len(caplog.messages) == 1


def test_an_index_of_an_earlier_format_in_the_cache_is_made_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (shards / ".index").touch()  # no directory can be made there
    open_shards(shards)
    (place,) = (tmp_path / "cache" / "ssl_pipeline").iterdir()
    as_earlier_format(place, 2)
    assert open_shards(shards).sizes([7]).tolist() == [[10, 12]]
    assert len(caplog.messages) == 1


def test_an_index_of_an_earlier_format_that_cannot_be_written_is_made_in_the_cache(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_shards(shards)
    as_earlier_format(shards / ".index", 2)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: shards not in Path(path).parents and access(path, mode))
    assert open_shards(shards).sizes([7]).tolist() == [[10, 12]]
    assert json.loads((shards / ".index" / "index.json").read_text())["format"] == 2
    assert len(list((tmp_path / "cache" / "ssl_pipeline").glob("shards-*/index.json"))) == 1
