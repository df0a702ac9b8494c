"""A folder is packed once, known again, and refused when it has changed."""

import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ssl_pipeline.commands.images import expand
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.data.shards.origins import LISTING
from ssl_pipeline.packing.images_as_shards import packed
from ssl_pipeline.packing.make_shards import MakeShards, make_shards
from ssl_pipeline.packing.packed_once import SHARDS, differences, is_packed, pack_once
from ssl_pipeline.packing.sources import open_source
from tests.ranks import run_on_ranks


@pytest.fixture
def photos(tmp_path):
    for number, name in enumerate(("a.png", "deep/er/b.jpg", "deep/c.png", "d.jpg")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 16), (number * 50, 0, 0)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_any_nesting_is_packed_and_reused(tmp_path, photos):
    assert not is_packed(tmp_path / "run")
    shards = pack_once(str(photos), tmp_path / "run")
    assert is_packed(tmp_path / "run")
    assert len(open_shards(shards)) == 4
    times = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert pack_once(str(photos), tmp_path / "run") == shards
    assert {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")} == times


def test_a_zip_is_packed_too(tmp_path, photos):
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
    assert len(open_shards(pack_once(archive, tmp_path / "run"))) == 4
    assert pack_once(archive, tmp_path / "run") == tmp_path / "run" / SHARDS


def test_images_are_spoken_of_as_their_files_where_no_one_asked_for_shards(tmp_path, photos):
    index = open_shards(pack_once(str(photos), tmp_path / "run"))
    assert index.called == str(photos)
    named = {index.read(number).location for number in range(4)}
    assert named == {f"'{name}' of {photos}" for name in ("a.png", "deep/er/b.jpg", "deep/c.png", "d.jpg")}
    unlabelled = "'(a.png|d.jpg)', has no label"
    assert re.fullmatch(f"2 of 4 images have no usable label; the first, {unlabelled}", index.label_problem())
    make_shards(MakeShards(source=str(photos), output=tmp_path / "own", workers=1))
    own = open_shards(tmp_path / "own")  # whoever made shards knows them
    assert own.called == str(tmp_path / "own")
    assert "shard 'own-000000.tar', key '" in own.label_problem()
    assert own.read(0).location.startswith("own-000000.tar, key '")


def test_none_that_can_be_decoded_is_told_with_the_folder(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"None of the 1 images of '{tmp_path}/broken' can be decoded; 'a\.jpg': "):
        pack_once(str(tmp_path / "broken"), tmp_path / "run")


def test_a_folder_that_changed_is_refused_by_name(tmp_path, photos):
    pack_once(str(photos), tmp_path / "run")
    (photos / "d.jpg").unlink()
    Image.new("RGB", (64, 64)).save(photos / "new.png")
    Image.new("RGB", (99, 99)).save(photos / "a.png")
    sentence = r"1 new \(new\.png\), 1 gone \(d\.jpg\), 1 of another size \(a\.png\)"
    with pytest.raises(DataError, match=sentence):
        pack_once(str(photos), tmp_path / "run")


def test_a_copy_of_the_folder_is_the_same_whatever_its_times(tmp_path, photos):
    shards = pack_once(str(photos), tmp_path / "run")
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (0, 0))
    assert pack_once(str(tmp_path / "copy"), tmp_path / "run") == shards


def test_another_folder_is_told_by_both_names(tmp_path, photos):
    pack_once(str(photos), tmp_path / "run")
    other = shutil.copytree(photos, tmp_path / "other")
    assert pack_once(str(other), tmp_path / "run") == tmp_path / "run" / SHARDS  # the same images
    (other / "a.png").unlink()
    told = rf"images='{other}' is not what was packed into '.*', which came from '{photos}': 1 gone \(a\.png\)\. Choose"
    with pytest.raises(DataError, match=told):
        pack_once(str(other), tmp_path / "run")


def test_what_is_no_image_may_change(tmp_path, photos):
    shards = pack_once(str(photos), tmp_path / "run")
    (photos / "notes.txt").write_text("other words")
    assert pack_once(str(photos), tmp_path / "run") == shards


def test_a_packing_that_was_cut_short_is_done_again(tmp_path, photos):
    shards = pack_once(str(photos), tmp_path / "run")
    (tmp_path / "run" / LISTING).unlink()  # as of a start that was killed before its end
    assert not is_packed(tmp_path / "run")
    assert pack_once(str(photos), tmp_path / "run") == shards
    assert len(open_shards(shards)) == 4


def test_shards_that_somebody_removed_are_packed_again_with_the_same_images(tmp_path, photos, capsys):
    shards = pack_once(str(photos), tmp_path / "run")
    before = open_shards(shards).fingerprint
    for path in shards.glob("*.tar"):
        path.unlink()
    assert not is_packed(tmp_path / "run")
    assert pack_once(str(photos), tmp_path / "run", key="images") == shards
    assert f"Shards of images='{photos}' are gone from '{shards}'. It is packed again." in capsys.readouterr().out
    assert open_shards(shards).fingerprint == before


@pytest.mark.parametrize("known", [True, False])
def test_a_packed_shard_that_is_damaged_is_told_with_the_folder_and_packed_anew(tmp_path, photos, known):
    shards = pack_once(str(photos), tmp_path / "run")
    if known:
        before = open_shards(shards).fingerprint
    shard = next(shards.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:700])
    told = rf"What was packed from {photos} is damaged: .*\. Delete the folder '{shards}' and run the same command"
    with pytest.raises(DataError, match=told) as error:
        open_shards(shards)
    assert "opy" not in str(error.value)
    shutil.rmtree(shards)
    again = open_shards(pack_once(str(photos), tmp_path / "run"))
    assert not known or again.fingerprint == before


def test_parts_of_a_data_set_are_all_taken_without_labels_which_is_said(tmp_path, capsys):
    for part in ("train", "test", "annotations"):
        (tmp_path / "set" / part).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "set" / part / "x.png")
    (tmp_path / "set" / "annotations" / "x.png").rename(tmp_path / "set" / "annotations" / "x.xml")
    index = open_shards(pack_once(str(tmp_path / "set"), tmp_path / "run"))
    assert (len(index), index.has_labels) == (2, False)
    assert (
        f"images={tmp_path}/set holds train/, test/: parts of a data set. All 2 images are packed as one set, without "
        f"labels. images={tmp_path}/set/train takes one of them, and its folders as classes."
    ) in capsys.readouterr().out
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    pack_once(archive, tmp_path / "other")
    assert f"make_shards source={archive} prefix=train/ takes one of them" in capsys.readouterr().out


def test_many_differences_are_counted_and_some_named():
    said = differences({}, {f"{number}.jpg": 1 for number in range(2000)})
    assert said == "2,000 new (0.jpg, 1.jpg, 10.jpg, ...)"


def test_a_damaged_listing_is_named(tmp_path, photos):
    pack_once(str(photos), tmp_path / "run")
    (tmp_path / "run" / LISTING).write_text('["a.png"]\n')
    with pytest.raises(DataError, match=r"images\.jsonl' is damaged"):
        pack_once(str(photos), tmp_path / "run")


def test_a_folder_is_walked_once_on_its_way_into_shards(tmp_path, photos, monkeypatch):
    walked, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda root, **more: walked.append(root) or walk(root, **more))
    expand([f"images={photos}", f"output={tmp_path / 'run'}"])
    assert walked == [photos]


def test_other_processes_get_a_source_without_its_list(photos):
    source = open_source(str(photos), "", None)
    assert len(source.names()) == 5
    assert pickle.loads(pickle.dumps(source)).__dict__ == {"root": photos}


def packed_by_each(source: str, place: Path) -> tuple[str, int]:
    shards = packed(source, place, renewed=True)
    return shards, len(open_shards(shards))


def test_processes_pack_once_and_wait_for_what_has_changed(tmp_path, photos):
    arguments = (str(photos), tmp_path / "cache")
    shards = str(tmp_path / "cache" / SHARDS)
    assert run_on_ranks(packed_by_each, *arguments) == [(shards, 4)] * 2
    Image.new("RGB", (64, 64)).save(photos / "new.png")
    assert run_on_ranks(packed_by_each, *arguments) == [(shards, 5)] * 2
