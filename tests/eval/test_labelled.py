"""Doubts about labelled images: the same for all evaluators and monitors."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssl_pipeline.backbones import Preprocessing
from ssl_pipeline.config import ConfigError, run_command
from ssl_pipeline.data.shards.open import DataError, open_shards
from ssl_pipeline.eval import knn, linear
from ssl_pipeline.eval.features.extract import Extraction
from ssl_pipeline.eval.labelled import look_at_first, open_labelled
from ssl_pipeline.eval.monitors import (
    ClassifierMonitor,
    ClassifierMonitorConfig,
    SpectrumMonitorConfig,
    readable_images,
)
from ssl_pipeline.eval.votes import voted_hits
from ssl_pipeline.schedule import Progress
from tests.tiny import write_shards as write_tiny_shards

WriteShards = Callable[..., Path]
IDENTIFIERS = [3_000_000_000, 7, 9_000_000_000_000]


@pytest.fixture(params=["knn", "linear"])
def evaluate(request: pytest.FixtureRequest) -> Callable[..., int]:
    schema, module = {"knn": (knn.KnnConfig, knn), "linear": (linear.LinearConfig, linear)}[request.param]
    settings = ["backbone=raw_pixels", "size=16", "workers=0"] + ["k=5"] * (request.param == "knn")
    return lambda *arguments: run_command(schema, module.main, command="", argv=[*settings, *arguments])


def test_test_images_that_are_training_images_are_counted(
    evaluate: Callable[..., int], train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(f"train={train}", f"test={train}") == 0
    assert capsys.readouterr().err.startswith(f"warning: 72 of 72 images of {train} are in {train} too")
    assert evaluate(f"train={train}", f"test={test}") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_report_carries_its_doubts(train: str, tmp_path: Path) -> None:
    config = knn.KnnConfig(backbone="raw_pixels", size=16, train=train, test=train, workers=0, output=tmp_path)
    (warning,) = knn.evaluate_knn(config)["protocol"]["warnings"]
    assert "72 of 72 images" in warning


def test_classes_that_training_lacks_are_named_with_their_images(
    evaluate: Callable[..., int], write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_shards(tmp_path / "train", [0, 1] * 20, names=("cat", "dog"), seed=1)
    test = write_shards(tmp_path / "test", [0, 1, 1, 2], names=("bird", "cat", "dog"), seed=2)
    assert evaluate(f"train={train}", f"test={test}") == 0
    captured = capsys.readouterr()
    assert f"1 of 4 images of {test} are of classes that {train} has no image of, and count as wrong: 'bird' (1)." in (
        captured.err
    )


def test_classes_are_the_same_by_name(write_shards: WriteShards, tmp_path: Path) -> None:
    train = write_shards(tmp_path / "train", [0, 1, 2] * 2, names=("cat", "dog", "owl"), seed=1)
    test = write_shards(tmp_path / "test", [0, 1], names=("owl", "cat"), seed=2)
    images = open_labelled(str(train), str(test), task="k-NN")
    assert images.train_labels.tolist() == [0, 1, 2] * 2
    assert images.test_labels.tolist() == [2, 0]


def test_labels_may_be_identifiers(
    evaluate: Callable[..., int], write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_shards(tmp_path / "train", IDENTIFIERS * 20, seed=1)
    test = write_shards(tmp_path / "test", IDENTIFIERS * 3, seed=2)
    images = open_labelled(str(train), str(test), task="k-NN")
    assert (images.num_classes, images.train_labels[:3].tolist()) == (3, [1, 0, 2])
    assert evaluate(f"train={train}", f"test={test}") == 0
    assert capsys.readouterr().out.count("100.00 %") >= 1


def test_missing_labels_are_counted_and_the_way_out_is_told(
    evaluate: Callable[..., int], train: str, write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    some = write_shards(tmp_path / "some", [0, 1, 2, 3] + [None] * 36)
    assert evaluate(f"train={train}", f"test={some}") == 2
    error = capsys.readouterr().err
    assert f"{some} has labels for 4 of 40 images" in error
    assert "36 of 40 images have no usable label" in error
    assert "labels=FILE.csv" in error


def test_one_class_is_nothing_to_measure(
    evaluate: Callable[..., int], test: str, write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dogs = write_shards(tmp_path / "dogs", [1] * 8)
    assert evaluate(f"train={dogs}", f"test={test}") == 2
    assert f"needs two classes or more in the training set. Got one: all images of {dogs} are of class 1." in (
        capsys.readouterr().err
    )


def test_classes_without_a_vote_are_not_among_the_five_best() -> None:
    scores_NC = torch.tensor([[0.0, 3.0, 0.0, 1.0], [0.0, 3.0, 0.0, 1.0], [0.0, 3.0, 0.0, 1.0]])
    assert voted_hits(scores_NC, torch.tensor([1, 3, 0])).tolist() == [[True, False, False], [True, True, False]]


def classifier_monitor(val: Path, labelled: Path) -> ClassifierMonitor:
    return ClassifierMonitor(
        ClassifierMonitorConfig(every="1ep", val=str(val)),
        Extraction(Preprocessing(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), batch_size=16, workers=0),
        classifier=torch.nn.Linear(3, 3),
        num_classes=3,
        labelled=open_shards(labelled),
    )


def test_the_classifiers_classes_are_compared_by_name(
    write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = write_shards(tmp_path / "labelled", [0, 1, 2], names=("cat", "dog", "owl"), seed=1)
    fewer = write_shards(tmp_path / "fewer", [0, 1, 0], names=("dog", "owl"), seed=2)
    assert classifier_monitor(fewer, labelled).labels.tolist() == [1, 2, 1]
    other = write_shards(tmp_path / "other", [0, 1, 2], names=("bird", "cat", "dog"), seed=3)
    with pytest.raises(ConfigError, match=r"needs the classes of the labelled images .* It has images of 'bird'\."):
        classifier_monitor(other, labelled)
    assert capsys.readouterr().err == ""
    classifier_monitor(labelled, labelled)
    assert "3 of 3 images" in capsys.readouterr().err


def test_a_classifiers_images_that_are_none_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_tiny_shards(tmp_path / "images", (5,), corrupt=(1, 3))
    monitor = classifier_monitor(images, write_tiny_shards(tmp_path / "labelled", (3,)))
    assert monitor.labels.tolist() == [0, 2, 1]
    assert "classifier leaves out what it cannot measure: 2 of 5 images" in capsys.readouterr().err
    means = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert monitor(means, Progress(0, 1, 1.0)).keys() == {"classifier_top1", "classifier_top5"}


def test_images_of_which_all_are_none_are_refused(tmp_path: Path) -> None:
    images = write_tiny_shards(tmp_path / "images", (2,), corrupt=(0, 1))
    config = SpectrumMonitorConfig(every="1ep", val=str(images))
    with pytest.raises(DataError, match=r"spectrum: 2 of 2 images of .* cannot be decoded; the first: part-0"):
        readable_images(config, "spectrum", open_shards(images), 16)


def test_the_first_image_is_decoded_before_training(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        info = tarfile.TarInfo("a.jpg")
        info.size = 4
        shard.addfile(info, io.BytesIO(b"none"))
    with pytest.raises(DataError, match=r"Cannot decode a\.tar, key 'a'"):
        look_at_first(open_shards(tmp_path), 16)


def test_a_model_built_for_a_size_is_measured_at_it(train: str, test: str, tmp_path: Path) -> None:
    arguments = "arguments={img_size: 32, patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}"
    command = ["backbone=vit_tiny_patch16_224", arguments, f"train={train}", f"test={test}", f"output={tmp_path}"]
    assert run_command(knn.KnnConfig, knn.main, command="", argv=["workers=0", *command]) == 0
    assert '"size": 32' in (tmp_path / "eval" / "knn.json").read_text()
