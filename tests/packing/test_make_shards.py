import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline.config import run_command
from ssl_pipeline.data.decode import decode_image
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.packing.make_shards import MakeShards, key_of, make_shards
from ssl_pipeline.packing.sources import DigitsSource

GOLDEN_TEST_DIGITS = ["0/0078.png", "0/0202.png", "0/0252.png"]
CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10.zip"


def made(source: Path | str, output: Path, **settings: object) -> Path:
    config = MakeShards(source=str(source), output=output, **{"workers": 1, "samples_per_shard": 6} | settings)
    assert make_shards(config) == 0
    return output


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def test_a_folder_of_class_folders_becomes_shards(folder: Path, tmp_path: Path) -> None:
    output = made(folder, tmp_path / "out", prefix="train/")
    index = open_shards(output)
    assert index.shard_counts.tolist() == [6, 6, 6, 4]
    assert sorted(path.name for path in output.glob("*.tar")) == [f"out-00000{number}.tar" for number in range(4)]
    assert index.class_names == ("cat", "dog", "owl")
    samples = [index.read(number) for number in range(22)]
    assert Counter(sample.label for sample in samples) == {0: 10, 1: 7, 2: 5}
    for number, sample in enumerate(samples):
        key, _, name = sample.key.partition("-")
        file = next(folder.glob(f"train/{name.replace('_', '/')}.*"))
        assert int(key) == number
        assert sample.image == file.read_bytes()  # never encoded again
        assert index.class_names[sample.label] == file.parent.name


def test_the_manifest_says_what_is_there(folder: Path, tmp_path: Path) -> None:
    output = made(folder, tmp_path / "out", prefix="train")
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["samples"], manifest["rejected"], manifest["class_names"]) == (22, 1, ["cat", "dog", "owl"])
    assert manifest["source"]["shuffle_seed"] == 0
    for shard in manifest["shards"]:
        data = (output / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest["bytes"] == sum(shard["bytes"] for shard in manifest["shards"])
    assert (output / ".index" / "index.json").exists()


def test_samples_are_shuffled_across_classes(folder: Path, tmp_path: Path) -> None:
    index = open_shards(made(folder, tmp_path / "out", prefix="train"))
    labels = [index.read(number).label for number in range(22)]
    assert labels != sorted(labels)
    assert len(set(labels[:6])) > 1


def test_the_same_images_and_seed_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    archive = zipped(folder, tmp_path / "images.zip")
    first = contents(made(folder, tmp_path / "a" / "out", prefix="train"))
    several = contents(made(folder, tmp_path / "b" / "out", prefix="train", workers=3))
    from_zip = contents(made(archive, tmp_path / "c" / "out", prefix="train", workers=2))
    other = contents(made(folder, tmp_path / "d" / "out", prefix="train", shuffle_seed=1))
    assert first == several
    tars = [name for name in first if name.endswith(".tar")]
    assert [from_zip[name] for name in tars] == [first[name] for name in tars]
    assert [other[name] for name in tars] != [first[name] for name in tars]


@pytest.mark.parametrize("packed", [False, True])
def test_a_flat_folder_has_no_labels(folder: Path, tmp_path: Path, packed: bool) -> None:
    flat = folder / "train" / "dog"
    source = zipped(flat, tmp_path / "flat.zip") if packed else flat
    index = open_shards(made(source, tmp_path / "out"))
    assert len(index) == 7
    assert not index.has_labels
    assert index.class_names is None
    assert index.read(0).label is None


def test_files_that_do_not_decode_are_listed(folder: Path, tmp_path: Path) -> None:
    cats = folder / "train" / "cat"
    image = (cats / "00.JPEG").read_bytes()
    (cats / "cut.jpg").write_bytes(image[: len(image) // 2])
    (cats / "empty.png").touch()
    (cats / "text.webp").write_text("text")
    (cats / "misnamed.png").write_bytes(image)
    (cats / ".hidden.jpg").write_bytes(image)
    (folder / "train" / "loose.jpg").write_bytes(image)
    os.mkfifo(cats / "pipe.jpg")
    Image.new("RGB", (3, 3)).save(cats / "other.jp2")
    output = made(folder, tmp_path / "out", prefix="train", workers=2)
    rejected = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    reasons = {entry["file"]: entry["reason"] for entry in rejected}
    assert "truncated" in reasons.pop("cat/cut.jpg").lower()
    assert reasons == {
        "cat/.hidden.jpg": "hidden file",
        "cat/empty.png": "no JPEG, PNG or WebP image",
        "cat/notes.txt": "no image file",
        "cat/other.jp2": "a format that is not read: .jp2",
        "cat/pipe.jpg": "not a regular file",
        "cat/text.webp": "no JPEG, PNG or WebP image",
    }
    index = open_shards(output)
    assert len(index) == 24
    keys = [index.read(number).key for number in range(24)]
    misnamed = next(key for key in keys if key.endswith("cat_misnamed"))
    with tarfile.open(next(output.glob(f"*-{int(misnamed[:8]) // 6:06d}.tar"))) as archive:
        assert f"{misnamed}.jpg" in archive.getnames()  # named by its content


def test_an_empty_class_folder_keeps_its_number(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "bee").mkdir()
    index = open_shards(made(folder, tmp_path / "out", prefix="train"))
    assert index.class_names == ("bee", "cat", "dog", "owl")
    assert {index.read(number).label for number in range(22)} == {1, 2, 3}


def test_webdataset_reads_what_was_written(folder: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    output = made(folder, tmp_path / "out", prefix="train")
    paths = [str(path) for path in sorted(output.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    index = open_shards(output)
    assert [(sample["__key__"], int(sample["cls"])) for sample in samples] == [
        (index.read(number).key, index.read(number).label) for number in range(22)
    ]


@pytest.mark.parametrize(
    "name",
    [
        "a.b/c d/é.x.jpg",
        "../../etc/passwd.jpg",
        "/abs.jpg",
        "n" * 300 + ".jpg",
        ".jpg",
        "\U00020000" * 300 + ".png",
        "\udcff.jpg",
    ],
)
def test_keys_are_plain_whatever_the_file_is_called(name: str) -> None:
    key = key_of(7, name)
    assert key.startswith("00000007-")
    assert len(key) <= 69
    assert len(key.encode()) <= 249
    assert not set(key) & set("./\\ ")


def test_a_hostile_zip_is_harmless(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pipeline.packing.sources.MAX_FILE_BYTES", 1 << 20)
    image = (folder / "train" / "cat" / "00.JPEG").read_bytes()
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside/a.jpg", image)
        archive.writestr("/absolute/b.jpg", image)
        link = zipfile.ZipInfo("links/c.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bombs/d.jpg", bytes(2 << 20))
        archive.writestr("__MACOSX/e.jpg", b"1")
    output = made(tmp_path / "hostile.zip", tmp_path / "sub" / "out")
    assert open_shards(output).class_names == ("absolute", "bombs", "links", "outside")
    assert len(open_shards(output)) == 2
    rejected = {json.loads(line)["file"]: json.loads(line)["reason"] for line in (output / "rejected.jsonl").open()}
    assert rejected["bombs/d.jpg"] == "larger than 1 MiB"
    assert rejected["links/c.jpg"] == "no JPEG, PNG or WebP image"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.zip", "images", "sub"]


def test_a_damaged_zip_member_is_rejected(tmp_path: Path, folder: Path) -> None:
    path = zipped(folder, tmp_path / "images.zip")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("train/cat/03.JPEG").header_offset
    data[offset + 100 : offset + 110] = b"0123456789"
    path.write_bytes(data)
    output = made(path, tmp_path / "out", prefix="train")
    rejected = [json.loads(line)["file"] for line in (output / "rejected.jsonl").open()]
    assert "cat/03.JPEG" in rejected
    assert len(open_shards(output)) == 21


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_however_damaged_ends_in_no_traceback(folder: Path, tmp_path: Path, method: int) -> None:
    path = tmp_path / "whole.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for number in range(4):
            archive.write(folder / "train" / "cat" / f"{number:02d}.JPEG", f"c{number % 2}/é{number}.jpg")
    whole = path.read_bytes()
    generator = np.random.default_rng(method)
    read = refused = 0
    for number in range(40):
        data = bytearray(whole)
        start = len(whole) * 9 // 10 if number % 2 else 0  # where the directory of the archive lies
        for place in generator.integers(start, len(whole), 8):
            data[place] = generator.integers(256)
        (tmp_path / f"{number}.zip").write_bytes(data)
        try:
            made(tmp_path / f"{number}.zip", tmp_path / "out", labels="none", overwrite=True)
            read += 1
        except DataError:
            refused += 1
    assert read > 5
    assert refused > 0


def test_a_zip_of_an_odd_version_or_with_odd_names_is_named(folder: Path, tmp_path: Path) -> None:
    image = (folder / "train" / "cat" / "00.JPEG").read_bytes()
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/é.jpg", image)
        archive.writestr("c/b.jpg", image)
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[: entry + 6] + b"\xff\xff" + whole[entry + 8 :])  # the version that it needs
    with pytest.raises(DataError, match=r"odd\.zip' cannot be read as a zip: zip file version 25\.5\. Pack it again"):
        made(path, tmp_path / "out")
    path = tmp_path / "other_odd.zip"
    path.write_bytes(whole[:entry] + whole[entry:].replace("é".encode(), b"\xff\xfe"))  # no UTF-8, which it claims
    with pytest.raises(DataError, match=r"odd\.zip' cannot be read as a zip: .*utf-8"):
        made(path, tmp_path / "out")


def test_digits_are_split_once_and_for_all(tmp_path: Path) -> None:
    train, test = DigitsSource("train"), DigitsSource("test")
    assert (len(train.names()), len(test.names())) == (1437, 360)
    assert not set(train.names()) & set(test.names())
    assert test.names()[:3] == GOLDEN_TEST_DIGITS
    per_class = Counter(name[0] for name in test.names())
    assert min(per_class.values()) >= 34
    pixels = decode_image(test.read(test.names()[0]))
    assert pixels.shape == (8, 8, 3)
    assert pixels.max() == 255  # 16 of 16
    index = open_shards(made("digits", tmp_path / "digits", split="test", samples_per_shard=1000))
    assert len(index) == 360
    assert index.class_names == tuple("0123456789")
    assert index.read(0).key.split("-")[1].startswith(str(index.read(0).label))


def test_an_output_in_use_is_refused(folder: Path, tmp_path: Path) -> None:
    output = made(folder, tmp_path / "out", prefix="train")
    before = contents(output)
    with pytest.raises(DataError, match=r"is not empty .*overwrite=true replaces"):
        made(folder, output, prefix="train")
    assert contents(output) == before
    made(folder, output, prefix="train/dog", overwrite=True)
    assert len(open_shards(output)) == 7
    (output / "thesis.docx").touch()
    with pytest.raises(DataError, match=r"holds 'thesis\.docx', which make_shards did not write"):
        made(folder, output, prefix="train", overwrite=True)
    (output / "thesis.docx").unlink()
    index = len(open_shards(output / "out-*.tar"))  # with an index of its own, which is ours too
    made(folder, output, prefix="train/dog", overwrite=True)
    assert index == len(open_shards(output)) == 7
    with pytest.raises(DataError, match="is a file"):
        made(folder, folder / "train" / "cat" / "notes.txt", prefix="train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "nowhere"}, "source='nowhere' does not exist. Needed: a folder of images, a zip of one"),
        ({"source": __file__}, "is not a folder, a zip or an image"),
        ({"prefix": "trian"}, r"nothing below prefix=trian/\. Did you mean 'train'\? Top folders: train"),
        ({"prefix": "train/../.."}, "nothing below prefix"),
        ({"split": "test"}, "split=test goes with source=digits only"),
        ({"source": "digits", "prefix": "train"}, "source=digits has no folders"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, settings: dict, message: str
) -> None:
    arguments = {"source": str(folder), "output": str(tmp_path / "out")} | settings
    argv = [f"{name}={value}" for name, value in arguments.items()]
    assert run_command(MakeShards, make_shards, command="make_shards", argv=argv) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(DataError, match=message):
        make_shards(MakeShards(**{"workers": 1} | arguments | {"output": tmp_path / "out"}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_parts_of_a_data_set_are_no_classes(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train" / "dog", folder / "Test" / "dog")
    (folder / "val").mkdir()
    with pytest.raises(DataError, match=r"holds train/, Test/: .* prefix=train/, .* labels=none\. .* labels=folders"):
        made(folder, tmp_path / "out")
    with pytest.raises(DataError, match=r"prefix=images/train/"):
        made(tmp_path, tmp_path / "out", prefix="images")
    unlabelled = open_shards(made(folder, tmp_path / "all", labels="none"))
    assert (len(unlabelled), unlabelled.has_labels, unlabelled.class_names) == (29, False, None)
    assert open_shards(made(folder, tmp_path / "out", labels="folders")).class_names == ("Test", "train", "val")
    shutil.copytree(folder / "train" / "dog", folder / "trains")  # images of another name: they may all be classes
    assert len(open_shards(made(folder, tmp_path / "classes")).class_names) == 4


def test_a_source_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no image file .* among 0 files"):
        made(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "a.jpg").write_text("text")
    with pytest.raises(
        DataError, match=r"None of the 1 images of .* can be decoded; 'a\.jpg': no JPEG, PNG or WebP image"
    ):
        made(tmp_path / "empty", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_interrupted_run_leaves_nothing_that_looks_whole(folder: Path, tmp_path: Path) -> None:
    for number in range(2000):
        shutil.copyfile(folder / "train" / "cat" / "00.JPEG", folder / "train" / "cat" / f"copy-{number}.jpg")
    output = tmp_path / "out"
    arguments = [f"source={folder}", f"output={output}", "prefix=train", "workers=2", "samples_per_shard=50"]
    run = subprocess.Popen([sys.executable, "-m", "data_tools.make_shards", *arguments], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.partial-*/*.tar")):
        assert run.poll() is None
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not output.exists()
    assert len(open_shards(made(folder, output, prefix="train/dog"))) == 7


def test_leftovers_of_an_interrupted_run_are_cleared(folder: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".out.partial-abc"
    leftover.mkdir()
    (leftover / "out-000000.tar").write_bytes(b"half a shard")
    (leftover / ".lock").touch()
    output = made(folder, tmp_path / "out", prefix="train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]
    assert not (output / ".lock").exists()
    assert output.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777


def test_a_link_in_place_of_a_lock_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial-abc").mkdir()
    (tmp_path / ".out.partial-abc" / ".lock").symlink_to(folder / "train" / "cat" / "notes.txt")
    (tmp_path / ".out.partial-def").symlink_to(folder)
    with pytest.raises(OSError, match="is a symbolic link, which is not followed here"):
        made(folder, tmp_path / "out", prefix="train")
    shutil.rmtree(tmp_path / ".out.partial-abc")
    made(folder, tmp_path / "out", prefix="train")
    assert (tmp_path / ".out.partial-def").is_symlink()
    assert len(list(folder.rglob("*.JPEG"))) == 10


def test_two_runs_do_not_write_the_same_output(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial-abc").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    arguments = [sys.executable, "-c", hold, str(tmp_path / ".out.partial-abc" / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(DataError, match="Another make_shards is writing"):
            made(folder, tmp_path / "out", prefix="train")
        other.communicate(b"\n")
    assert len(open_shards(made(folder, tmp_path / "out", prefix="train"))) == 22


def disturbed(output: Path, change: str) -> Path:
    """Something in the output that no make_shards left there."""
    shard = output / "out-000000.tar"
    if change == "backup":
        return Path(shutil.copy(shard, output / "backup.tar"))
    if change == "grown":
        shard.write_bytes(shard.read_bytes() + bytes(512))
        return shard
    if change == "link":
        target = shutil.move(shard, output.parent / "elsewhere.tar")
        shard.symlink_to(target)
        return shard
    if change == "index":
        (output / ".index" / "notes.txt").touch()
        return output / ".index"
    (output / "manifest.json").write_text('{"class_names": null, "shards": []}')  # somebody else's
    return output / "manifest.json"


@pytest.mark.parametrize("change", ["backup", "grown", "link", "index", "manifest"])
def test_overwrite_deletes_nothing_that_is_not_ours(folder: Path, tmp_path: Path, change: str) -> None:
    output = made(folder, tmp_path / "out", prefix="train")
    stranger = disturbed(output, change)
    before = contents(output)
    with pytest.raises(DataError, match=rf"holds '{re.escape(stranger.name)}', which make_shards did not write, or"):
        made(folder, output, prefix="train", overwrite=True)
    assert stranger.exists()
    assert contents(output) == before


def test_loose_photographs_beside_folders_are_kept(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(3):
        shutil.copy(folder / "train" / "cat" / "00.JPEG", folder / "train" / f"loose{number}.jfif")
    for source in (folder / "train", zipped(folder / "train", tmp_path / "train.zip")):
        index = open_shards(made(source, tmp_path / source.suffix / "out"))
        assert (len(index), index.class_names) == (25, ("cat", "dog", "owl"))
        assert Counter(index.labels().tolist()) == {0: 10, 1: 7, 2: 5, -1: 3}
        assert "25 images in 3 classes (cat, dog, owl), 3 of them without a label" in capsys.readouterr().out


def test_a_zip_with_backslashes_has_its_folders(folder: Path, tmp_path: Path) -> None:
    plain, windows = zipped(folder, tmp_path / "plain.zip"), tmp_path / "windows.zip"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(windows, "w") as new:
        for entry in old.infolist():
            name = zipfile.ZipInfo("x")
            name.filename = entry.filename.replace("/", "\\")  # the constructor may change it
            new.writestr(name, old.read(entry))
    first, second = (made(path, tmp_path / path.stem / "out", prefix="train") for path in (plain, windows))
    assert [path.read_bytes() for path in sorted(first.glob("*.tar"))] == [
        path.read_bytes() for path in sorted(second.glob("*.tar"))
    ]
    assert open_shards(second).class_names == ("cat", "dog", "owl")


def test_names_in_utf8_are_read_where_a_zip_does_not_say_so(folder: Path, tmp_path: Path) -> None:
    image = (folder / "train" / "cat" / "00.JPEG").read_bytes()
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr("été/a.jpg", image)
        archive.writestr("hiver/b.jpg", image)
    data = (tmp_path / "mac.zip").read_bytes()
    data = re.sub(
        rb"(PK\x03\x04..|PK\x01\x02....)\x00\x08", lambda match: match[1] + bytes(2), data, flags=re.DOTALL
    )  # "this is UTF-8"
    (tmp_path / "mac.zip").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "mac.zip") as archive:
        assert not archive.infolist()[0].flag_bits & 0x800
    assert open_shards(made(tmp_path / "mac.zip", tmp_path / "out")).class_names == ("hiver", "été")


def test_a_key_keeps_its_letters_and_leads_back_to_its_file(folder: Path, tmp_path: Path) -> None:
    names = ("été/grüße 1.jpg", "été/a.b.jpg", "猫/三毛.jpg", "हिन्दी/बिल्ली.jpg", "猫/" + "長" * 80 + ".jpg")
    for name in names:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "train" / "cat" / "00.JPEG", tmp_path / "source" / name)
    index = open_shards(made(tmp_path / "source", tmp_path / "bilder-été", samples_per_shard=2))
    keys = {index.origin(number): index.key(number) for number in range(len(index))}
    assert keys.keys() == set(names)
    stems = {name: key.partition("-")[2] for name, key in keys.items()}
    assert [stems[name] for name in names[:4]] == ["été_grüße_1", "été_a_b", "猫_三毛", "हिन्दी_बिल्ली"]
    assert f"from '{index.origin(0)}'" in index.read(0).location
    lines = [json.loads(line) for line in (tmp_path / "bilder-été" / "files.jsonl").read_text().splitlines()]
    assert lines == [{"key": index.key(number), "file": index.origin(number)} for number in range(5)]
    assert sorted(path.name for path in (tmp_path / "bilder-été").glob("*.tar"))[0] == "bilder_été-000000.tar"
    (tmp_path / "bilder-été" / "files.jsonl").write_text("torn\n")
    assert index.origin(0) is None
    webdataset = pytest.importorskip("webdataset")
    paths = [str(path) for path in sorted((tmp_path / "bilder-été").glob("*.tar"))]
    read = [sample["__key__"] for sample in webdataset.WebDataset(paths, shardshuffle=False)]
    assert read == [index.key(number) for number in range(5)]


def test_the_origin_of_a_part_is_named_from_the_source_on(folder: Path, tmp_path: Path) -> None:
    index = open_shards(made(folder, tmp_path / "out", prefix="/train/"))
    for number in range(len(index)):
        assert (folder / index.origin(number)).read_bytes() == index.read(number).image


def test_what_is_left_out_is_counted_by_reason(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(30):
        (folder / "train" / "cat" / f"{number}.jxl").touch()
        (folder / "train" / "dog" / f"{number}.jpg").write_text("text")
    cut = (folder / "train" / "cat" / "00.JPEG").read_bytes()
    for number in range(1, 6):
        (folder / "train" / "owl" / f"{number}.jpg").write_bytes(cut[: -100 * number])  # each cut elsewhere
    (folder / "train" / "dog" / "again").symlink_to(folder / "train" / "cat")
    made(folder, tmp_path / "out", prefix="train")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("67 files left out: 30 a format that is not read: .jxl ('cat/0.jxl'); 30 no JPEG, PNG or")
    assert re.search(r"; 5 [^;]*runcated[^;]* \('owl/1\.jpg'\)", line)
    assert "1 the same folder as another ('dog/again')" in line
    assert line.endswith("rejected.jsonl")


def test_a_table_of_labels(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(
        "\ufefflabel,author,file\nred,x,train/cat/00.JPEG\nblue,x,train\\cat\\01.JPEG\n,x,./train/cat/02.JPEG\n"
        "grün,x,train/dog/10.PNG\nred,x,train/nothing.jpg\n".encode()
    )
    index = open_shards(made(folder, tmp_path / "out", labels=str(table)))
    assert index.class_names == ("blue", "grün", "red")
    found = {index.origin(number): int(label) for number, label in enumerate(index.labels())}
    assert {name: label for name, label in found.items() if label >= 0} == {
        "train/cat/00.JPEG": 2,
        "train/cat/01.JPEG": 0,
        "train/dog/10.PNG": 1,
    }
    assert len(found) == 22
    assert "1 rows of" in (out := capsys.readouterr().out)
    assert "such as 'train/nothing.jpg'" in out
    part = open_shards(made(folder, tmp_path / "cats", labels=str(table), prefix="train/dog"))
    assert part.class_names == ("blue", "grün", "red")  # the classes are those of the whole table
    assert sorted(part.labels().tolist()) == [-1] * 6 + [1]


def test_labels_that_are_numbers_are_sorted_by_number(tmp_path: Path, folder: Path) -> None:
    table = tmp_path / "labels.CSV"
    table.write_text("file,label\n" + "".join(f"cat/0{number}.JPEG,{number + 2}\n" for number in range(10)))
    index = open_shards(made(folder, tmp_path / "out", labels=str(table), prefix="train"))
    assert index.class_names == tuple(str(number) for number in range(2, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na,b\n", r"needs the columns file,label in its first line\. It has name,label"),
        ("", r"It has nothing"),
        ("file,label\na.jpg,\n", "holds no label"),
        ("file,label\na.jpg,x\nb.jpg,x\n./a.jpg,y\n", r"line 4: 'a\.jpg' has the label 'y', and 'x' above"),
        ("file,label\na.jpg,x\n", r"names none of the 22 images of source='.*', such as 'train/cat/00\.JPEG'"),
        ("file,label\n\xff,x\n", "is not a CSV file in UTF-8"),
    ],
)
def test_mistakes_in_a_table_of_labels_are_named(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        made(folder, tmp_path / "out", labels=str(tmp_path / "labels.csv"))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        made(folder, tmp_path / "out", labels=str(tmp_path / "nothing.csv"))


def test_a_share_of_every_class_is_held_out(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "train" / "cat" / "00.JPEG", folder / "train" / "loose.jpg")
    output = made(folder, tmp_path / "a" / "out", prefix="train", holdout="20%")
    train, test = (open_shards(output / part) for part in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog", "owl")
    assert Counter(test.labels().tolist()) == {0: 2, 1: 1, 2: 1}
    assert Counter(train.labels().tolist()) == {0: 8, 1: 6, 2: 4, -1: 1}
    assert (output / "rejected.jsonl").exists()
    origins = [{index.origin(number) for number in range(len(index))} for index in (train, test)]
    assert not origins[0] & origins[1]
    assert len(origins[0] | origins[1]) == 23
    again = made(folder, tmp_path / "b" / "out", prefix="train", holdout="20%", workers=2)
    other = made(folder, tmp_path / "c" / "out", prefix="train", holdout="20%", shuffle_seed=1)
    for part in ("train", "test"):
        assert contents(again / part) == contents(output / part)
    assert (contents(other / "test")["files.jsonl"]) != contents(output / "test")["files.jsonl"]
    with pytest.raises(DataError, match="is not empty"):
        made(folder, output, prefix="train", holdout="20%")
    made(folder, output, prefix="train", holdout="50%", overwrite=True)
    assert len(open_shards(output / "test")) == 5 + 4 + 3
    (output / "test" / "thesis.docx").touch()
    with pytest.raises(DataError, match=r"holds 'test/thesis\.docx', which make_shards did not write"):
        made(folder, output, prefix="train", overwrite=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"holdout": "10"}, "must be a share between 0% and 100%, such as 10%. Got 10."),
        ({"holdout": "100%"}, "must be a share between 0% and 100%"),
        ({"holdout": "10%", "labels": "none"}, "labels=none leaves no class"),
        ({"labels": "table"}, "must be folders, none or a FILE.csv with the columns file and label. Got table."),
    ],
)
def test_holdout_and_labels_are_checked_before_anything_is_read(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MakeShards(source="nowhere", output=Path("nowhere"), **settings)


def test_a_holdout_needs_classes_of_two(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no class folders"):
        made(folder / "train" / "cat", tmp_path / "out", holdout="10%")
    for name in ("a", "b"):
        (tmp_path / "few" / name).mkdir(parents=True)
        shutil.copy(folder / "train" / "cat" / "00.JPEG", tmp_path / "few" / name)
    with pytest.raises(DataError, match="needs a class of two images or more"):
        made(tmp_path / "few", tmp_path / "out", holdout="10%")


@pytest.mark.skipif(not CIFAR10.exists(), reason=f"needs {CIFAR10.name} in shared/data")
def test_a_part_of_cifar10(tmp_path: Path) -> None:
    index = open_shards(made(CIFAR10, tmp_path / "cats", prefix="test/cat/", samples_per_shard=400))
    assert index.shard_counts.tolist() == [400, 400, 200]
    assert decode_image(index.read(999).image).shape == (32, 32, 3)
