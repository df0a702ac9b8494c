"""eval.classifier: what a run's own classifier says of images is what its files say, and is counted right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssl_pipeline.backbones import load_backbone, load_classifier, save_classifier
from ssl_pipeline.config import ConfigError
from ssl_pipeline.data.evaluation import EvaluationSet
from ssl_pipeline.data.shards.open import open_shards
from ssl_pipeline.eval.classifier import ClassifierConfig, evaluate_classifier, main, measure_classified
from ssl_pipeline.eval.features.classes import class_probabilities, open_classifier
from ssl_pipeline.eval.intervals import share_interval
from tests.eval.conftest import NUM_CLASSES, WriteShards

NAMES = ("ant", "bee", "cat", "dog", "emu", "fox")


@pytest.fixture
def classifying(run: Path) -> Path:
    """The run with a classifier of its own."""
    generator = torch.Generator().manual_seed(3)
    classifier = nn.Linear(24, NUM_CLASSES)
    nn.init.normal_(classifier.weight, generator=generator)
    save_classifier(run, classifier, NAMES)
    return run


def config(run: Path, test: str, **settings: object) -> ClassifierConfig:
    return ClassifierConfig(run=run, test=test, workers=0, batch_size=8, device="cpu", **settings)


def test_numbers_that_can_be_checked():
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.8, 0.2, 0.0]])
    found = measure_classified(probabilities, torch.tensor([0, 0, 1, 1]))
    assert found.top1 == 75.0
    assert found.balanced == 75.0
    assert found.classes.recall[:2].tolist() == [100.0, 50.0]
    assert found.classes.recall[2].isnan()  # a class without images counts in no mean
    assert found.ece == pytest.approx(5.0, abs=1e-4)
    assert found.top1_interval[0] < 75.0 < found.top1_interval[1]
    assert found.balanced_interval[0] <= 75.0 <= found.balanced_interval[1]


def test_a_rare_class_counts_as_much_as_a_frequent_one():
    probabilities = torch.tensor([[0.9, 0.1]] * 10)
    found = measure_classified(probabilities, torch.tensor([0] * 9 + [1]))
    assert found.top1 == 90.0
    assert found.balanced == 50.0


def test_what_is_always_right_has_an_interval_and_a_rare_class_makes_it_wide():
    right = torch.tensor([[1.0, 0.0]] * 99 + [[0.0, 1.0]])
    found = measure_classified(right, right.argmax(dim=1))
    assert (found.top1, found.balanced, found.ece) == (100.0, 100.0, 0.0)
    assert found.top1_interval == share_interval(100.0, 100)
    assert found.balanced_interval == pytest.approx(share_interval(100.0, 4 / (1 / 99 + 1)))
    assert found.ece_interval == share_interval(0.0, 100)


def test_probabilities_are_those_of_backbone_and_classifier(classifying: Path, test: str) -> None:
    settings = config(classifying, test)
    opened, index = open_classifier(settings), open_shards(test)
    found = torch.cat(list(class_probabilities(opened, index, settings, description="images")))
    (backbone, preprocessing), (classifier, _) = load_backbone(classifying), load_classifier(classifying)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
    images = torch.stack([EvaluationSet(index, 16)[sample][0] for sample in range(len(index))])
    with torch.no_grad():
        expected = classifier(backbone.eval()((images / 255 - mean) / std)).softmax(dim=1)
    assert_close(found, expected)
    some = list(class_probabilities(opened, index, settings, description="images", samples=[4, 2]))
    assert_close(torch.cat(some), expected[[4, 2]])


def test_the_report_has_every_class_by_name(classifying: Path, test: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(classifying, test))
    report = json.loads((classifying / "eval" / "classifier.json").read_text())
    classes = report["by_class"]
    assert [row["class"] for row in classes["per_class"]] == list(NAMES)
    assert sum(row["images"] for row in classes["per_class"]) == report["protocol"]["num_test"] == 31
    right = sum(row["images"] * row["top1"] / 100 for row in classes["per_class"])
    assert report["top1"] == pytest.approx(100 * right / 31)
    assert report["ece_interval"][0] <= report["ece_interval"][1]
    printed = capsys.readouterr().out
    assert "calibration error (ECE)" in printed
    assert "written to" in printed


def test_classes_are_compared_by_name(classifying: Path, tmp_path: Path, write_shards: WriteShards) -> None:
    other_order = write_shards(tmp_path / "other", [0, 1, 0], names=("fox", "ant"))
    found = evaluate_classifier(config(classifying, str(other_order)))
    counts = {row["class"]: row["images"] for row in found["by_class"]["per_class"]}
    assert counts == {"ant": 1, "bee": 0, "cat": 0, "dog": 0, "emu": 0, "fox": 2}


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, None], (), r"needs labels below 6\. It has images without a label"),
        ([0, 6], (), r"needs labels below 6\. It has the label 6"),
        ([0, 1], ("ant", "gnu"), r"needs the classes of the labelled images .* It has images of 'gnu'"),
    ],
)
def test_images_that_it_cannot_judge_are_refused(
    labels: list[int | None],
    names: tuple[str, ...],
    message: str,
    classifying: Path,
    tmp_path: Path,
    write_shards: WriteShards,
) -> None:
    shards = write_shards(tmp_path / "odd", labels, names=names)
    with pytest.raises(ConfigError, match=message):
        evaluate_classifier(config(classifying, str(shards)))


def test_a_run_without_a_classifier_is_refused(run: Path, test: str) -> None:
    with pytest.raises(ConfigError, match="the run's method does not train a classifier"):
        evaluate_classifier(config(run, test))


def test_a_classifier_of_another_backbone_is_refused(run: Path, test: str) -> None:
    save_classifier(run, nn.Linear(5, 6), None)
    with pytest.raises(ConfigError, match="a classifier of 5 features but a backbone of 24"):
        evaluate_classifier(config(run, test))
