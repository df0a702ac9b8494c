from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ssl_pipeline.config import ConfigError, run_command
from ssl_pipeline.data.shards.manifest import read_manifest
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.data.subset import open_subset
from ssl_pipeline.data_tools.split_labels import SplitLabels, choose, split_labels
from ssl_pipeline.packing.make_shards import MakeShards, make_shards


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """Ten cats, seven dogs and five owls in four shards."""
    output = tmp_path / "all"
    make_shards(MakeShards(source=str(folder), output=output, prefix="train/", samples_per_shard=6, workers=1))
    return output


def split(shards: Path, output: Path, labels_per_class: int, **settings: object) -> Path:
    config = SplitLabels(shards=str(shards), output=output, labels_per_class=labels_per_class, **settings)
    assert split_labels(config) == 0
    return output


def images(folder: Path) -> dict[bytes, int | None]:
    index = open_shards(folder)
    return {raw.image: raw.label for raw in map(index.read, range(len(index)))}


def test_each_class_has_its_number_of_images_as_they_were(shards: Path, tmp_path: Path) -> None:
    chosen = split(shards, tmp_path / "few", 3)
    index = open_shards(chosen)
    assert index.class_names == open_shards(shards).class_names == ("cat", "dog", "owl")
    assert index.has_labels
    assert Counter(index.labels().tolist()) == {0: 3, 1: 3, 2: 3}
    assert images(chosen).items() <= images(shards).items()  # the bytes are not encoded again
    assert len(images(chosen)) == 9
    assert index.labels().tolist() != sorted(index.labels().tolist())  # classes are mixed


def test_keys_tell_where_an_image_came_from(shards: Path, tmp_path: Path) -> None:
    index, whole = open_shards(split(shards, tmp_path / "few", 2)), open_shards(shards)
    for number in range(len(index)):
        raw = index.read(number)
        place, origin = raw.key.split("-", 1)
        sample, *key = origin.split("_")
        assert int(place) == number
        assert whole.read(int(sample)).image == raw.image
        assert whole.key(int(sample)).replace("-", "_") == "_".join(key)


def test_the_choice_depends_on_the_seed_alone(shards: Path, tmp_path: Path) -> None:
    first, again, other = (
        split(shards, tmp_path / name, 3, seed=seed) for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert [path.read_bytes() for path in first.glob("*.tar")] == [path.read_bytes() for path in again.glob("*.tar")]
    assert images(first).keys() != images(other).keys()
    assert images(split(shards, tmp_path / "fewer", 2, seed=1)).items() <= images(first).items()


def test_the_choice_is_the_same_on_every_machine() -> None:
    labels = np.arange(60) % 3
    config = SplitLabels(shards="x", output=Path("y"), labels_per_class=2, seed=7)
    assert choose(labels, config, None) == [50, 52, 16, 45, 36, 38]


def test_large_splits_have_several_shards_and_a_manifest(shards: Path, tmp_path: Path) -> None:
    chosen = split(shards, tmp_path / "few", 5, samples_per_shard=4)
    assert open_shards(chosen).shard_counts.tolist() == [4, 4, 4, 3]
    manifest = read_manifest(chosen)
    assert manifest is not None
    assert [shard.samples for shard in manifest.shards] == [4, 4, 4, 3]


def test_a_class_with_too_few_images_is_told(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"shards={shards}", f"output={tmp_path / 'few'}", "labels_per_class=6"]
    assert run_command(SplitLabels, split_labels, command="split", argv=argv) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed == [
        f"error: labels_per_class=6 is more than shards='{shards}' has of class 2 (owl): 5. Take at most that many."
    ]
    assert not (tmp_path / "few").exists()


def test_classes_that_have_a_name_but_no_image_are_too_few() -> None:
    config = SplitLabels(shards="x", output=Path("y"), labels_per_class=1)
    with pytest.raises(DataError, match=r"of class 1 \(dog\): 0\."):
        choose(np.zeros(5, dtype=np.int64), config, ("cat", "dog"))


def test_a_fraction_of_a_class_without_images_is_told_in_its_own_words() -> None:
    config = SplitLabels(shards="x", output=Path("y"), fraction="50%")
    with pytest.raises(DataError, match=r"fraction=50% takes one image .*='x' has none of class 1 \(dog\)"):
        choose(np.zeros(5, dtype=np.int64), config, ("cat", "dog"))


def test_shards_without_labels_are_refused(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    make_shards(MakeShards(source=str(folder / "train" / "cat"), output=flat, workers=1))
    with pytest.raises(DataError, match="has no labels to choose by"):
        split(flat, tmp_path / "few", 1)


def test_a_file_of_another_kind_is_no_output() -> None:
    with pytest.raises(ValueError, match=r"must be a directory, .* Got the name of a file, 'few\.json'"):
        SplitLabels(shards="all", output=Path("few.json"), labels_per_class=1)


def test_an_output_in_use_stays_unless_it_is_to_be_replaced(shards: Path, tmp_path: Path) -> None:
    output = split(shards, tmp_path / "few", 2)
    with pytest.raises(DataError, match="overwrite=true"):
        split(shards, output, 3)
    assert len(images(output)) == 6
    assert len(images(split(shards, output, 3, overwrite=True))) == 9


def test_the_shards_themselves_are_never_replaced(shards: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(shards)
    for output in (shards, link):
        with pytest.raises(DataError, match="holds the shards to choose from"):
            split(shards, output, 2, overwrite=True)
    assert len(open_shards(shards)) == 22


def test_an_unfinished_split_leaves_nothing(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("ssl_pipeline.data_tools.split_labels.write_manifest", fail)
    with pytest.raises(OSError, match="no space left"):
        split(shards, tmp_path / "few", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "images"]


def test_numbers_alone_choose_the_images_that_shards_would_hold(shards: Path, tmp_path: Path) -> None:
    copied, file = split(shards, tmp_path / "few", 3), split(shards, tmp_path / "new" / "few.npy", 3)
    chosen, rest = open_subset(str(shards), keep=file), open_subset(str(shards), keep=file.with_suffix(".rest.npy"))
    assert {chosen.read(number).image for number in range(len(chosen))} == images(copied).keys()
    assert Counter(chosen.labels().tolist()) == {0: 3, 1: 3, 2: 3}
    both = np.concatenate([chosen.in_whole_set(), rest.in_whole_set()])
    assert sorted(both.tolist()) == list(range(22))


def test_a_fraction_is_rounded_in_each_class_and_never_none(shards: Path, tmp_path: Path) -> None:
    for fraction, counts in (("30%", {0: 3, 1: 2, 2: 2}), ("1%", {0: 1, 1: 1, 2: 1})):
        config = SplitLabels(shards=str(shards), output=tmp_path / f"{fraction}.npy", fraction=fraction)
        assert split_labels(config) == 0
        assert Counter(open_subset(str(shards), keep=config.output).labels().tolist()) == counts


def test_numbers_are_not_replaced_unasked_and_of_all_images_there_is_no_rest(shards: Path, tmp_path: Path) -> None:
    file = split(shards, tmp_path / "few.npy", 2)
    with pytest.raises(ConfigError, match=r"few\.npy exists\. Choose another name, or set overwrite=true"):
        split(shards, file, 3)
    split(shards, file, 3, overwrite=True)
    assert len(np.load(file)) == 9
    split_labels(SplitLabels(shards=str(shards), output=file, fraction="100%", overwrite=True))
    assert np.load(file).tolist() == list(range(22))
    assert sorted(path.name for path in tmp_path.glob("few*")) == ["few.json", "few.npy"]  # the old rest is wrong now


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "exactly one of labels_per_class=N and fraction=1% must be given"),
        ({"labels_per_class": 2, "fraction": "1%"}, "exactly one of"),
        ({"fraction": "0%"}, r"must be a share above 0% and up to 100%, such as 1%\. Got 0%"),
        ({"fraction": 0.01}, r"Got 0\.01"),
    ],
)
def test_a_choice_has_one_size(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SplitLabels(shards="all", output=Path("few"), **settings)
