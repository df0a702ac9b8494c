"""Labels and subsets next to the shards: the same images and labels on every path, and one sentence for a misfit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_pipeline.augment.views import ViewGroup
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data.evaluation import EvaluationSet, evaluation_batches
from ssl_pipeline.data.labelled import open_labelled_images, open_labelled_stream
from ssl_pipeline.data.shards.open import ShardIndex, open_shards
from ssl_pipeline.data.stream import DataConfig, LabelledConfig, StreamBatch, open_images, open_stream
from ssl_pipeline.data.subset import open_subset, write_keep, write_labels

GROUPS = {"view": ViewGroup(count=1, size=8)}
KEPT = [1, 2, 6, 7, 13, 14, 19]  # of 7 + 5 + 8
MODES = [{}, {"workers": 1}, {"crop_on": "device"}, {"cache": True}]


def soft_labels(rows: int = 20) -> np.ndarray:
    return np.random.default_rng(0).dirichlet((1.0, 1.0, 1.0), rows).astype(np.float32)


@pytest.fixture
def kept(shards: Path, tmp_path: Path) -> Path:
    write_keep(tmp_path / "kept.npy", open_shards(shards), KEPT, origin="a test")
    return tmp_path / "kept.npy"


@pytest.fixture
def classes(shards: Path, tmp_path: Path) -> Path:
    """Image i has class i, and every fifth none."""
    labels = np.where(np.arange(20) % 5 == 4, -1, np.arange(20))
    write_labels(tmp_path / "classes.npy", open_shards(shards), labels, class_names=None, origin={"round": 1})
    return tmp_path / "classes.npy"


@pytest.fixture
def soft(shards: Path, tmp_path: Path) -> Path:
    names = ("cat", "dog", "cow")
    write_labels(tmp_path / "soft.npy", open_shards(shards), soft_labels(), class_names=names, origin=None)
    return tmp_path / "soft.npy"


def batches(index: ShardIndex, count: int = 4, **settings: object) -> list[StreamBatch]:
    config = DataConfig(shards="", batch_size=5, block_shards=2, **{"workers": 0} | settings)
    stream = open_stream(index, GROUPS, config, seed=0, position=0, rank=0, world_size=1, batches=count)
    return [batch.clone() for batch in stream]


# subsets


def test_what_is_kept_is_numbered_anew(shards: Path, kept: Path) -> None:
    whole, index = open_shards(shards), open_subset(shards, keep=kept)
    assert len(index) == 7
    assert index.shard_counts.tolist() == [3, 1, 3]
    assert index.in_whole_set().tolist() == KEPT
    assert index.in_whole_set([6, 0]).tolist() == [19, 1]
    for place, number in enumerate(KEPT):
        here, there = index.read(place), whole.read(number)
        assert (here.image, here.label, here.location) == (there.image, there.label, there.location)
        assert (here.sample, index.key(place)) == (place, whole.key(number))
    assert index.labels().tolist() == [number % 4 for number in KEPT]
    assert index.has_labels
    assert index.class_names == whole.class_names
    with pytest.raises(IndexError, match=r"\[0, 7\)"):
        index.read(7)


def test_sizes_and_bytes_are_those_of_what_is_kept(tmp_path: Path, write_tar: Callable, encoded: Callable) -> None:
    sizes = [(12, 10), (30, 7), (9, 40), (16, 16)]  # (width, height)
    for shard in (0, 1):
        files = {f"{n}.png": encoded(n, size=sizes[(2 * shard + n) % 4], format="PNG") for n in range(6)}
        write_tar(tmp_path / f"{shard}.tar", files)
    whole = open_shards(tmp_path)
    write_keep(tmp_path / "kept.npy", whole, [2, 5, 7], origin=None)
    index = open_subset(tmp_path, keep=tmp_path / "kept.npy")
    assert index.sizes().tolist() == whole.sizes([2, 5, 7]).tolist() == [[40, 9], [7, 30], [16, 16]]
    assert index.sizes([2, 0]).tolist() == [[16, 16], [40, 9]]
    assert index.shard_pixel_bytes.tolist() == [3 * (360 + 210), 3 * 256]
    assert index.image_bytes == sum(len(whole.read(number).image) for number in (2, 5, 7))


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_shows_each_kept_image_once_an_epoch(shards: Path, kept: Path, mode: dict[str, object]) -> None:
    index = open_subset(shards, keep=kept)
    read = batches(index, 7, **mode)
    places = torch.cat([batch.sample_ids for batch in read])
    for epoch in places.view(5, 7).tolist():
        assert sorted(epoch) == list(range(7))
    labels = torch.cat([batch.labels for batch in read])
    assert labels.tolist() == [KEPT[place] % 4 for place in places.tolist()]


def test_evaluation_shows_what_is_kept(shards: Path, kept: Path) -> None:
    whole, index = EvaluationSet(open_shards(shards), 8), EvaluationSet(open_subset(shards, keep=kept), 8)
    for images, labels, ids in evaluation_batches(index, range(7), batch_size=4, workers=0):
        for image, label, place in zip(images, labels.tolist(), ids.tolist(), strict=True):
            assert torch.equal(image, whole[KEPT[place]][0])
            assert label == KEPT[place] % 4


def test_an_index_under_an_overlay_can_be_sent_to_a_worker(shards: Path, tmp_path: Path, soft: Path) -> None:
    write_keep(tmp_path / "most.npy", open_shards(shards), range(1, 20), origin=None)
    index = open_subset(shards, keep=tmp_path / "most.npy", labels=soft)
    before = index.read(3).label, index.sizes([3])
    sent = pickle.dumps(index)
    assert len(sent) < 3000
    assert pickle.loads(sent).read(3).label.tolist() == before[0].tolist()


def test_overlays_are_part_of_what_a_set_is(
    shards: Path, tmp_path: Path, kept: Path, classes: Path, soft: Path
) -> None:
    write_keep(tmp_path / "other.npy", open_shards(shards), KEPT[1:], origin=None)
    overlays = [{}, {"keep": kept}, {"keep": tmp_path / "other.npy"}, {"labels": classes}, {"labels": soft}]
    indexes = [open_subset(shards, **overlay) for overlay in (*overlays, {"keep": kept, "labels": soft})]
    assert len({index.fingerprint for index in indexes}) == len({tuple(index.checksums) for index in indexes}) == 6
    assert indexes[0].fingerprint == open_shards(shards).fingerprint
    again = open_subset(shards, keep=kept)
    assert again.fingerprint == indexes[1].fingerprint


def test_a_subset_of_a_subset_counts_in_the_whole_set(shards: Path, tmp_path: Path, kept: Path) -> None:
    write_keep(tmp_path / "fewer.npy", open_subset(shards, keep=kept), np.array([5, 0, 2, 5]), origin=None)
    assert open_subset(shards, keep=tmp_path / "fewer.npy").in_whole_set().tolist() == [1, 6, 14]


# labels


@pytest.mark.parametrize("mode", MODES)
def test_labels_of_the_whole_set_follow_what_is_kept(
    shards: Path, kept: Path, classes: Path, mode: dict[str, object]
) -> None:
    expected = [-1 if number % 5 == 4 else number for number in KEPT]
    index = open_subset(shards, keep=kept, labels=classes)
    assert index.labels().tolist() == expected
    assert not index.has_labels
    assert [index.read(place).label for place in range(7)] == [None if label < 0 else label for label in expected]
    for batch in batches(index, **mode):
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [expected[place] for place in batch.sample_ids.tolist()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_keep", [False, True])
def test_soft_labels_arrive_as_rows(
    shards: Path, kept: Path, soft: Path, mode: dict[str, object], with_keep: bool
) -> None:
    index = open_subset(shards, keep=kept if with_keep else None, labels=soft)
    expected = soft_labels()[KEPT] if with_keep else soft_labels()
    assert index.has_labels
    assert index.num_soft_classes == 3
    assert index.class_names == ("cat", "dog", "cow")
    assert index.labels().tolist() == expected.tolist()
    for batch in batches(index, **mode):
        assert batch.labels.dtype == torch.float32
        assert batch.labels.tolist() == expected[batch.sample_ids.numpy()].tolist()
        assert batch.to("cpu").labels.shape == (5, 3)


def test_evaluation_hands_out_soft_labels(shards: Path, soft: Path) -> None:
    images = EvaluationSet(open_subset(shards, labels=soft), 8)
    found = [labels for _, labels, _ in evaluation_batches(images, range(20), batch_size=8, workers=1)]
    assert torch.cat(found).tolist() == soft_labels().tolist()


def test_a_row_of_zeros_is_no_label(shards: Path, tmp_path: Path) -> None:
    labels = soft_labels()
    labels[4] = 0
    write_labels(tmp_path / "soft.npy", open_shards(shards), labels, class_names=None, origin=None)
    assert not open_subset(shards, labels=tmp_path / "soft.npy").has_labels


def test_labels_of_a_subset_are_written_for_the_whole_set(shards: Path, tmp_path: Path, kept: Path) -> None:
    index = open_subset(shards, keep=kept)
    for name, labels, absent in (("hard", np.arange(7), -1), ("soft", soft_labels(7), [0, 0, 0])):
        write_labels(tmp_path / f"{name}.npy", index, labels, class_names=None, origin=None)
        whole = open_subset(shards, labels=tmp_path / f"{name}.npy").labels()
        assert whole[KEPT].tolist() == labels.tolist()
        assert [whole[number].tolist() for number in set(range(20)) - set(KEPT)] == [absent] * 13


def test_the_settings_of_a_run_open_its_images(shards: Path, tmp_path: Path, kept: Path, classes: Path) -> None:
    write_keep(tmp_path / "few.npy", open_shards(shards), [0, 5, 10], origin=None)
    labelled = LabelledConfig(shards=str(shards), keep=tmp_path / "few.npy", labels=classes, batch_size=3)
    config = DataConfig(shards=str(shards), batch_size=2, workers=0, keep=kept, labelled=labelled)
    assert open_images(config).in_whole_set().tolist() == KEPT
    index = open_labelled_images(config)
    assert index.labels().tolist() == [0, 5, 10]
    stream = open_labelled_stream(index, GROUPS, config, seed=0, step=0, rank=0, world_size=1, accumulate=1)
    assert sorted(next(stream).labels.tolist()) == [0, 5, 10]
    unlabelled = config.model_copy(update={"labelled": labelled.model_copy(update={"keep": kept})})
    with pytest.raises(DataError, match=r"data\.labelled\.shards=.* has images without labels; all of them need one"):
        open_labelled_images(unlabelled)


def test_the_description_says_where_a_file_comes_from(shards: Path, classes: Path) -> None:
    description = json.loads(classes.with_suffix(".json").read_text())
    assert description["origin"] == {"round": 1}
    assert (description["images"], description["content"]) == (20, "labels")
    assert description["fingerprint"] == open_shards(shards).fingerprint


# what does not fit


def replace_array(path: Path, array: np.ndarray) -> None:
    """Another array under a description that vouches for it."""
    from ssl_pipeline.files import sha256_of

    np.save(path, array, allow_pickle=True)
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"sha256": sha256_of(path)}))


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (ids(1, 2, 20), r"keeps image 20; the shards have 20, from 0 to 19\."),
        (ids(-1, 2), r"keeps image -1; the shards have 20"),
        (ids(3, 2), r"must be ascending, each number once\. Got 3 before 2 at 0\."),
        (ids(1, 5, 5), r"Got 5 before 5 at 1\."),
        (ids(), r"keeps no image\."),
        (np.array([1, 2], dtype=np.int32), r"must hold int64 \(K,\), .* Got int32 \(2,\)\."),
        (ids(1, 2)[None], r"Got int64 \(1, 2\)\."),
        (np.ones(20, dtype=bool), r"Got bool \(20,\)\."),
        (np.array([1, None]), r"is not an array of numbers in numpy's format \(pickles are not read\)\."),
    ],
)
def test_files_of_images_to_keep_that_are_refused(shards: Path, kept: Path, array: np.ndarray, sentence: str) -> None:
    replace_array(kept, array)
    with pytest.raises(DataError, match=r"^data\.keep=.*kept\.npy .*" + sentence) as error:
        open_subset(shards, keep=kept)
    assert "\n" not in str(error.value)


def with_value(value: float) -> np.ndarray:
    labels = soft_labels()
    labels[7, 1] = value
    return labels


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.arange(19), r"must have a label for each of the 20 images of the shards, including .* Got 19\."),
        (soft_labels(21), r"must have a label for each of the 20 images .* Got 21\."),
        (np.arange(20) - 2, r"must hold classes from 0 on, or -1 for none\. Got -2\."),
        (np.arange(20) % 4, r"has label 3 for image 3, but names only 3 classes\."),
        (np.ones((20, 4), dtype=np.float32), r"has soft labels of 4 classes, but names 3\."),
        (np.arange(20, dtype=np.int32), r"must hold int64 \(N,\), .* Got int32 \(20,\)\."),
        (np.ones((20, 3)), r"must hold int64 \(N,\), .* Got float64 \(20, 3\)\."),
        (np.ones(20, dtype=np.float32), r"Got float32 \(20,\)\."),
        (with_value(np.nan), r"must hold finite soft labels that are not negative\. Got nan for image 7\."),
        (with_value(np.inf), r"Got inf for image 7\."),
        (with_value(-0.5), r"Got -0\.5 for image 7\."),
        (100 * soft_labels(), r"must hold soft labels that sum to 1, or all 0 for .* Got a sum of 100 for image 0\."),
        (np.array([object()] * 20), r"is not an array of numbers in numpy's format \(pickles are not read\)\."),
    ],
)
def test_files_of_labels_that_are_refused(shards: Path, soft: Path, array: np.ndarray, sentence: str) -> None:
    replace_array(soft, array)
    with pytest.raises(DataError, match=r"^data\.labelled\.labels=.*soft\.npy .*" + sentence) as error:
        open_subset(shards, labels=soft, key="data.labelled")
    assert "\n" not in str(error.value)


def test_soft_labels_are_checked_to_the_end(shards: Path, soft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pipeline.data.shards.overlay.ROWS_CHECKED", 3)
    replace_array(soft, with_value(np.nan))
    with pytest.raises(DataError, match="Got nan for image 7"):
        open_subset(shards, labels=soft)


def test_a_file_made_for_other_images_is_refused(shards: Path, kept: Path) -> None:
    with pytest.raises(DataError, match=r"kept\.npy was made for other images than those of '.*' \(fingerprint "):
        open_subset(shards / "part-00000[01].tar", keep=kept)


def test_a_file_of_the_other_kind_is_refused(shards: Path, kept: Path, classes: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.labels=.* must hold labels\. '.*' says that it holds numbers of im"):
        open_subset(shards, labels=kept)
    with pytest.raises(
        DataError, match=r"^data\.keep=.* must hold numbers of images to keep\. '.*' says that it holds lab"
    ):
        open_subset(shards, keep=classes)


def test_a_file_without_a_fitting_description_is_refused(shards: Path, kept: Path) -> None:
    beside = kept.with_suffix(".json")
    whole = beside.read_text()
    for text in ("", "[]", "{}", '{"format": 1}'):
        beside.write_text(text)
        with pytest.raises(DataError, match=r"kept\.json' does not describe such a file\. Write both again\."):
            open_subset(shards, keep=kept)
    beside.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="has format 2, but 1 is needed"):
        open_subset(shards, keep=kept)
    beside.unlink()
    with pytest.raises(DataError, match=r"^data\.keep=.*kept\.npy needs 'kept\.json' next to it, which says what set"):
        open_subset(shards, keep=kept)
    beside.write_text(whole)
    np.save(kept, ids(1, 2), allow_pickle=False)  # a write that was cut short between the two
    with pytest.raises(DataError, match=r"is not the file that '.*kept\.json' describes: its SHA-256 differs"):
        open_subset(shards, keep=kept)


def test_missing_files_and_other_formats_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.keep=.*none\.npy: there is no such file\."):
        open_subset(shards, keep=tmp_path / "none.npy")
    (tmp_path / "ids.txt").write_text("1 2 3")
    with pytest.raises(DataError, match=r"^data\.keep=.*ids\.txt must be an \.npy file; its description is next to"):
        open_subset(shards, keep=tmp_path / "ids.txt")


def test_what_could_not_be_read_again_is_not_written(shards: Path, tmp_path: Path) -> None:
    index, path = open_shards(shards), tmp_path / "new.npy"
    for samples, sentence in (
        ([], r"No image of .* is left to keep, so '.*new\.npy' is not written"),
        ([3, 20], r"must lie in \[0, 20\)\. Got 3 to 20"),
        ([-1], "Got -1 to -1"),
        (np.ones(20, dtype=bool), "by their numbers, not by a mask"),
        ([0.5], "by their numbers, not by a mask"),
    ):
        with pytest.raises(DataError, match=sentence):
            write_keep(path, index, samples, origin=None)
    for labels, sentence in (
        (np.arange(19), "a label for each of the 20 images. Got 19"),
        (np.arange(20), "names only 3 classes"),
        (np.arange(20, dtype=np.int16), "Got int16"),
        (with_value(np.nan), "Got nan for image 7"),
    ):
        with pytest.raises(DataError, match=sentence):
            write_labels(path, index, labels, class_names=["a", "b", "c"], origin=None)
    with pytest.raises(DataError, match=r"must be an \.npy file"):
        write_keep(tmp_path / "new", index, [1], origin=None)
    assert not list(tmp_path.glob("*new*"))
