"""Shards made by others: what is no sample is counted and passed over, and labels matter where they are needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.labelled import open_labelled_images
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.data.stream import DataConfig, LabelledConfig, open_images
from ssl_pipeline.eval.labelled import open_labelled

Encoded = Callable[..., bytes]
WriteTar = Callable[..., Path]


@pytest.fixture
def twenty(encoded: Encoded) -> dict[str, bytes]:
    """Members of 20 good samples, labelled."""
    files: dict[str, bytes] = {}
    for number in range(20):
        files |= {f"{number:02d}.jpg": encoded(number), f"{number:02d}.cls": str(number % 3).encode()}
    return files


ODD: dict[str, tuple[tuple[str, ...], int, str]] = {
    "a README": (("README.md", "LICENSE.txt"), 0, ""),
    "a caption and a label": (("x.txt", "x.cls"), 1, r"key 'x', byte \d+: a sample needs one image .* \.txt, \.cls\."),
    "a label": (("x.cls",), 1, r"It has \.cls\."),
    "two images": (("x.jpg", "x.png"), 1, r"It has \.jpg, \.png\. Choose by data\.image_key=jpg\."),
    "an image of another name": (("x.input.jpg",), 1, r"It has \.input\.jpg\. Choose by data\.image_key=input\.jpg\."),
    "a key twice": (("07.png",), 1, "has the key '07' twice, again at byte"),
    "a member twice": (("x.jpg", "x.JPG"), 1, r"has the member 'x\.JPG' twice, again at byte"),
    "a name of a thousand letters": (("x" * 1000 + ".cls",), 1, "key 'xxx"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_sample_is_counted_and_passed_over(
    tmp_path: Path, write_tar: WriteTar, twenty: dict[str, bytes], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    names, passed_over, message = ODD[what]
    write_tar(tmp_path / "a.tar", twenty | dict.fromkeys(names, b"1"), format=1)
    for _ in ("made", "read again"):
        caplog.clear()
        index = open_shards(tmp_path)
        assert [index.read(number).label for number in range(len(index))] == [n % 3 for n in range(20)]
        assert index.read(19).image == twenty["19.jpg"]
        (line,) = caplog.messages
        others = 0 if passed_over else len(names)
        assert f"passed over {passed_over} of {20 + passed_over} samples and {others} files" in line
        assert re.search(message, line)
        assert len(line) < 700
    if passed_over:
        with pytest.raises(
            DataError, match=r"1 of 21 samples of '.*' cannot be used, more than data\.bad_sample_budget=0"
        ):
            open_shards(tmp_path, budget=0)


def test_more_than_the_budget_is_refused(tmp_path: Path, write_tar: WriteTar, twenty: dict[str, bytes]) -> None:
    write_tar(tmp_path / "a.tar", twenty | {f"x{number}.cls": b"1" for number in range(10)})
    assert len(open_shards(tmp_path)) == 20  # ten are few
    write_tar(tmp_path / "b.tar", {"y.cls": b"1"})
    with pytest.raises(DataError, match=r"was added after"):
        open_shards(tmp_path)
    with pytest.raises(
        DataError, match=r"11 of 31 samples .* data\.bad_sample_budget=0\.01 allows\. Shard 'a\.tar', key"
    ):
        open_shards(f"{tmp_path}/[ab].tar")
    config = DataConfig(shards=f"{tmp_path}/[ab].tar", batch_size=2, bad_sample_budget=0.4)
    assert len(open_images(config)) == 20


def test_shards_of_samples_without_an_image_say_why(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.input.jpg": b"1" for number in range(3)})
    with pytest.raises(
        DataError, match=r"no sample\. Shard 'a\.tar', key '0', byte 0: .* data\.image_key=input\.jpg\."
    ):
        open_shards(tmp_path)
    write_tar(tmp_path / "b.tar", {"9.jpg": b"1"})
    with pytest.raises(DataError, match=r"3 of 4 samples"):  # more than the samples that are left
        open_shards(f"{tmp_path}/*.tar")


def test_the_commonest_reason_is_told_with_its_count_and_its_hint(tmp_path: Path, write_tar: WriteTar) -> None:
    pairs = {f"s{number:02d}.{side}.jpg": b"1" for number in range(40) for side in "ab"}
    write_tar(tmp_path / "a.tar", {"README.md": b"1", "info.json": b"{}"} | pairs)
    with pytest.raises(DataError) as error:
        open_shards(tmp_path)
    assert str(error.value) == (
        f"'{tmp_path}' holds 1 shard but no sample. Shard 'a.tar', key 's00', byte 2048: a sample needs one image "
        "(.jpg, .jpeg, .png, .webp). It has .a.jpg, .b.jpg. 39 more have the same problem. "
        "Choose by data.image_key=a.jpg."
    )
    assert len(open_shards(tmp_path, image_key="a.jpg")) == 40


def test_the_shard_with_most_of_what_is_passed_over_tells_why(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "a.tar", {"info.json": b"{}"})
    write_tar(tmp_path / "b.tar", {f"{number}.a.jpg": b"1" for number in range(3)})
    with pytest.raises(
        DataError, match=r"2 shards but no sample\. Shard 'b\.tar'.* 2 more have the same problem\. Choose"
    ):
        open_shards(tmp_path)
    write_tar(tmp_path / "c.tar", {f"{number}.jpg": b"1" for number in range(3)})
    with pytest.raises(DataError, match=r"4 of 7 samples .* allows\. Shard 'b\.tar'"):
        open_shards(f"{tmp_path}/*.tar")


@pytest.mark.parametrize(
    ("names", "held"),
    [
        ([f"{number}.txt" for number in range(40)], ", but 40 .txt."),
        (["a.txt", "b.txt", "folder/Name", "d.JSON.gz"], ", but 2 .txt, 1 without extension, 1 .gz."),
        ([], "holds no file."),
    ],
)
def test_shards_of_other_files_say_what_they_hold(
    tmp_path: Path, write_tar: WriteTar, names: list[str], held: str
) -> None:
    write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"1"))
    with pytest.raises(DataError, match=f"no sample. Shard 'a.tar' .*{re.escape(held)}$"):
        open_shards(tmp_path)


def test_the_image_key_chooses(tmp_path: Path, write_tar: WriteTar, encoded: Encoded) -> None:
    members = {}
    for number in range(4):
        members |= {f"{number}.Input.jpg": encoded(number), f"{number}.target.jpg": encoded(10 + number)}
    members["4.target.jpg"] = encoded(14)
    write_tar(tmp_path / "a.tar", members)
    first = open_images(DataConfig(shards=str(tmp_path), batch_size=2, image_key="input.jpg"))
    second = open_images(DataConfig(shards=str(tmp_path), batch_size=2, image_key="target.jpg"))
    assert [first.read(number).image for number in range(4)] == [encoded(number) for number in range(4)]
    assert [second.read(number).image for number in range(5)] == [encoded(10 + number) for number in range(5)]
    assert [second.key(number) for number in range(5)] == ["0", "1", "2", "3", "4"]
    assert first.fingerprint != second.fingerprint  # other images: another set
    either = open_shards(tmp_path, image_key="input.jpg;target.jpg")
    assert [either.read(number).image for number in (3, 4)] == [encoded(3), encoded(14)]
    assert open_shards(tmp_path, image_key="input.jpg").read(0).image == encoded(0)  # its index was made once
    assert len(list(tmp_path.glob(".index-*"))) == 3


def test_an_image_key_chooses_among_remote_shards(tmp_path: Path, write_tar: WriteTar, encoded: Encoded) -> None:
    (tmp_path / "far").mkdir()
    write_tar(tmp_path / "far" / "a.tar", {"0.a.jpg": encoded(0), "0.b.jpg": encoded(1)})
    url, cache = (tmp_path / "far").as_uri(), tmp_path / "cache"
    indexes = [open_shards(url, cache_dir=cache, image_key=key) for key in ("a.jpg", "b.jpg", "a.jpg")]
    assert [index.read(0).image for index in indexes] == [encoded(0), encoded(1), encoded(0)]


NO_NUMBER = "shard 'a.tar', key '5', has a label that is not a 64-bit integer"
LABELS = {
    "a word": ({"5.cls": b"cat"}, NO_NUMBER),
    "damaged JSON": ({"5.json": b"{"}, NO_NUMBER),
    "deep JSON": ({"5.json": b"[" * 200_000}, NO_NUMBER),
    "a number too large": ({"5.cls": b"9223372036854775808"}, NO_NUMBER),
    "a huge member": ({"5.cls": b"1" * 5000}, NO_NUMBER),
    "nothing": ({}, "shard 'a.tar', key '5', has no label"),
    "JSON without one": ({"5.json": b'{"label": "cat"}'}, "shard 'a.tar', key '5', has no label"),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_matter_only_where_they_are_needed(
    tmp_path: Path, write_tar: WriteTar, encoded: Encoded, what: str
) -> None:
    label, message = LABELS[what]
    members: dict[str, bytes] = {}
    for number in range(8):
        members |= {f"{number}.jpg": encoded(number)}
        members |= label if number == 5 else {f"{number}.cls": b"1"}
    write_tar(tmp_path / "a.tar", members)
    index = open_images(DataConfig(shards=str(tmp_path), batch_size=2))
    assert index.labels().tolist() == [1] * 5 + [-1] + [1] * 2
    assert index.read(5).label is None
    assert not index.has_labels
    expected = f"1 of 8 images have no usable label; the first, {message}"
    assert index.label_problem() == expected
    with pytest.raises(ConfigError, match=f"has labels for 7 of 8 images; .*{expected}"):
        open_labelled(str(tmp_path), str(tmp_path), task="k-NN")
    config = DataConfig(shards=str(tmp_path), batch_size=2, labelled=LabelledConfig(shards=str(tmp_path)))
    with pytest.raises(DataError, match=expected):
        open_labelled_images(config)
    assert open_shards(tmp_path).overlaid(index.overlay).label_problem() == expected
