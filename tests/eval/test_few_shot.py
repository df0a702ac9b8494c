"""Few-shot accuracy: who is drawn, what is trained on them, what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import ConfigError, run_command
from ssl_pipeline.eval.few_shot import FewShotConfig, few_shot, few_shot_scores, main
from ssl_pipeline.eval.labelled import draw_per_class
from ssl_pipeline.eval.protocol import LabelledFeatures

MODEL = {"backbone": "raw_pixels", "train": "a", "test": "b"}


def call(*arguments: str) -> int:
    return run_command(FewShotConfig, main, command="python -m eval.few_shot", argv=["workers=0", *arguments])


def problem(classes: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classes along directions of their own, under noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(classes, 8, generator=generator)
    sets = []
    for count in (60, 90):
        labels = torch.arange(count) % classes
        sets += [directions[labels] + 0.7 * torch.randn(count, 8, generator=generator), labels]
    return sets[0], sets[1], sets[2], sets[3]


def test_each_class_gives_its_images_and_fewer_are_a_part_of_more() -> None:
    labels = torch.tensor([0] * 150 + [4] * 40 + [7] * 10)
    assert labels[draw_per_class(labels, 5, seed=0)].bincount()[[0, 4, 7]].tolist() == [5, 5, 5]
    assert labels[draw_per_class(labels, "10%", seed=0)].bincount()[[0, 4, 7]].tolist() == [15, 4, 1]
    assert labels[draw_per_class(labels, "1%", seed=0)].bincount()[[0, 4, 7]].tolist() == [2, 1, 1]
    assert set(draw_per_class(labels, 2, seed=3)) < set(draw_per_class(labels, 5, seed=3))
    assert draw_per_class(labels, 5, seed=3).tolist() != draw_per_class(labels, 5, seed=4).tolist()


@pytest.mark.parametrize("penalty", [5.0, 4000.0])
def test_the_classifier_minimises_the_objective_of_msn(penalty: float) -> None:
    """Cross-entropy + lambda / 2 |W|^2 of centred rows of length 1, without bias, lambda = 1 / inverse_penalty."""
    train, labels, test, _ = problem()
    config = FewShotConfig(**MODEL, inverse_penalty=penalty)
    scores = few_shot_scores(train, labels, test, num_classes=3, config=config)
    rows, other_rows = (normalize(part - part.mean(dim=1, keepdim=True), dim=1).double() for part in (train, test))
    weights = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(rows @ weights.T, labels, reduction="sum")
        value = value + weights.square().sum() / (2 * penalty)
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(scores.double(), other_rows @ weights.detach().T, rtol=1e-3, atol=2e-3)


def test_the_nearest_centroid_is_that_of_the_loop() -> None:
    train, labels, test, _ = problem()
    config = FewShotConfig(**MODEL, classifier="centroid")
    scores = few_shot_scores(train, labels, test, num_classes=3, config=config)
    centre = train.mean(dim=0)
    means = [
        torch.stack([normalize(row - centre, dim=0) for row in train[labels == label]]).mean(0) for label in range(3)
    ]
    for number, query in enumerate(test):
        distances = [float((normalize(query - centre, dim=0) - each).square().sum()) for each in means]
        assert int(scores[number].argmax()) == int(np.argmin(distances))


@pytest.mark.parametrize("classifier", ["logistic", "centroid"])
def test_two_classes_and_one_that_was_not_drawn(classifier: str) -> None:
    train, labels, test, test_labels = problem(2)
    config = FewShotConfig(**MODEL, classifier=classifier)
    scores = few_shot_scores(train, 2 * labels, test, num_classes=3, config=config)
    assert scores[:, 1].isinf().all()
    assert (scores.argmax(dim=1) == 2 * test_labels).double().mean() > 0.8


def test_more_images_help_and_the_spread_falls() -> None:
    train, labels, test, test_labels = problem()
    found = few_shot(
        LabelledFeatures(train, labels, test, test_labels, 3), FewShotConfig(**MODEL, per_class=(1, 20), fractions=())
    )
    one, twenty = found.measures
    assert one.value < twenty.value
    assert one.spread is not None
    assert one.spread > 0.0
    assert twenty.spread == 0.0  # all there are
    assert one.interval is not None
    assert one.interval[0] < one.value < one.interval[1]
    assert len(found.details["by_draw"]["top1_1_per_class"]) == 5


def test_a_run_is_measured_and_reported(run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"run={run}", f"train={train}", f"test={test}", "per_class=1,5,20", "draws=2", "baselines=true") == 0
    printed, warned = capsys.readouterr()
    assert "top-1, 5 per class" in printed
    assert "per_class=20 is more than" in warned
    report = json.loads((run / "eval" / "few_shot.json").read_text())
    assert report["evaluator"] == "few_shot"
    names = [measure["name"] for measure in report["measures"]]
    assert names == ["top1_1_per_class", "top1_5_per_class", "top1_1_percent", "top1_10_percent"]
    assert report["measures"][0].keys() == {"name", "title", "value", "unit", "interval", "spread"}
    assert report["baselines"]["raw_pixels"]["measures"][1]["value"] > 75.0  # the classes are colours
    assert report["protocol"]["classifier"] == "logistic"
    assert report["protocol"]["per_class"] == [1, 5]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("fractions=150%", "shares above 0% and up to 100%"),
        ("fractions=[]", "is more than"),
        ("draws=0", "draws must"),
    ],
)
def test_a_mistake_is_told(
    argument: str, message: str, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("backbone=raw_pixels", f"train={train}", f"test={test}", "per_class=500", argument) == 2
    assert message in capsys.readouterr().err


def test_features_that_are_not_finite_are_told_by_whose_they_are() -> None:
    train, labels, test, test_labels = problem()
    test[3, 1] = torch.nan
    features = LabelledFeatures(train, labels, test, test_labels, 3)
    with pytest.raises(ConfigError, match=r"Few-shot evaluation needs finite features: 1 of 90 test images"):
        few_shot(features, FewShotConfig(**MODEL))
