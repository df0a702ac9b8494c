"""Retrieval: average precision against a loop and by hand, recall, leave-one-out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pipeline.config import run_command
from ssl_pipeline.eval import retrieval
from ssl_pipeline.eval.protocol import LabelledFeatures
from ssl_pipeline.eval.retrieval import RetrievalConfig, average_precision, main, retrieve

MODEL = {"backbone": "raw_pixels", "train": "a", "test": "b"}


def call(*arguments: str) -> int:
    return run_command(RetrievalConfig, main, command="python -m eval.retrieval", argv=["workers=0", *arguments])


def in_loops(order: list[int], labels: list[int], own: int, positives: int) -> float:
    """The trapezoids below the curve of precision over recall, one rank at a time."""
    area, found, precision = 0.0, 0, 1.0
    for rank, number in enumerate(order, start=1):
        if labels[number] == own:
            found += 1
            area += (precision + found / rank) / 2 / positives
        precision = found / rank
    return area


def problem() -> LabelledFeatures:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(count, 6, generator=generator) for count in (40, 15)]
    labels = [torch.randint(0, 4, (count,), generator=generator) for count in (40, 15)]
    return LabelledFeatures(features[0], labels[0], features[1], labels[1], 4)


def orders(bank: Tensor, queries: Tensor) -> list[list[int]]:
    return (normalize(queries, dim=1) @ normalize(bank, dim=1).T).argsort(dim=1, descending=True).tolist()


def test_average_precision_by_hand() -> None:
    relevant = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    # the second: (0/1 + 1/2) / 2 and (1/3 + 2/4) / 2, the mean of both
    expected = [1.0, (0.25 + (1 / 3 + 1 / 2) / 2) / 2, 0.0]
    assert average_precision(relevant, torch.tensor([2, 2, 0])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("at_once", [2**24, 100])
def test_the_whole_bank_is_ranked_as_in_the_loop(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "RANKED_AT_ONCE", at_once)
    features = problem()
    labels, own = features.train_labels.tolist(), features.test_labels.tolist()
    ranked = orders(features.train, features.test)
    precisions = [in_loops(order, labels, label, labels.count(label)) for order, label in zip(ranked, own, strict=True)]
    recall = [any(labels[number] == label for number in order[:3]) for order, label in zip(ranked, own, strict=True)]
    found = retrieve(features, RetrievalConfig(**MODEL, recall_at=(3,)))
    assert found.measures[0].value == pytest.approx(100 * sum(precisions) / 15)
    assert found.measures[1].value == pytest.approx(100 * sum(recall) / 15)


def test_an_image_does_not_find_itself() -> None:
    features = problem()
    one = LabelledFeatures(features.train, features.train_labels, features.train, features.train_labels, 4)
    labels = features.train_labels.tolist()
    precisions = []
    for image, order in enumerate(orders(one.train, one.train)):
        others = [number for number in order if number != image]
        precisions.append(in_loops(others, labels, labels[image], labels.count(labels[image]) - 1))
    config = RetrievalConfig(**{**MODEL, "test": "a"}, leave_one_out=True)
    assert retrieve(one, config).measures[0].value == pytest.approx(100 * sum(precisions) / 40)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("search", ["faiss", "blocks"])
def test_the_first_images_are_those_of_the_whole_ranking(leave_one_out: bool, search: str) -> None:
    features = problem()
    if leave_one_out:
        features = LabelledFeatures(features.train, features.train_labels, features.train, features.train_labels, 4)
    settings = {**MODEL, "test": "a" if leave_one_out else "b", "leave_one_out": leave_one_out}
    whole = retrieve(features, RetrievalConfig(**settings))
    depth = 39 if leave_one_out else 40
    first = retrieve(features, RetrievalConfig(**settings, depth=depth, search=search))
    assert first.measures[0].name == f"map_at_{depth}"
    assert [m.value for m in first.measures] == pytest.approx([m.value for m in whole.measures])


def test_a_run_is_measured_and_reported(run: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"run={run}", f"train={train}", f"test={test}", "baselines=true") == 0
    assert "recall at 5" in capsys.readouterr().out
    report = json.loads((run / "eval" / "retrieval.json").read_text())
    assert [m["name"] for m in report["measures"]] == ["map", "recall_at_1", "recall_at_5", "recall_at_10"]
    assert report["baselines"]["raw_pixels"]["measures"][0]["value"] > 90.0  # the classes are colours
    low, high = report["measures"][0]["interval"]
    assert low < report["measures"][0]["value"] < high


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("recall_at=73", "the number of images that can be found (72). Got 73"),
        ("depth=2", "depth=2 must be at least the largest of recall_at"),
        ("leave_one_out=true", "leave_one_out=true looks for the images of train: set test="),
    ],
)
def test_a_mistake_is_told(
    argument: str, message: str, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("backbone=raw_pixels", f"train={train}", f"test={test}", argument) == 2
    assert message in capsys.readouterr().err
