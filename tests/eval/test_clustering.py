"""Clusters: k-means finds what is apart, and its figures are those of scikit-learn."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch.nn.functional import normalize

from ssl_pipeline.config import run_command
from ssl_pipeline.eval.clustering import (
    ClusteringConfig,
    adjusted_rand,
    cluster,
    contingency,
    k_means,
    main,
    match,
    mutual_information,
)
from ssl_pipeline.eval.intervals import share_interval

MODEL = {"backbone": "raw_pixels", "images": "a"}


def call(*arguments: str) -> int:
    return run_command(ClusteringConfig, main, command="python -m eval.clustering", argv=["workers=0", *arguments])


def groups(seed: int, clusters: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters that agree with classes for about half of 200 images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (200,), generator=generator)
    other = torch.randint(clusters, (200,), generator=generator)
    return torch.where(torch.rand(200, generator=generator) < 0.5, labels, other), labels


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    clusters, labels = groups(seed)
    counts = contingency(clusters, labels, num_clusters=5, num_classes=4)
    assert mutual_information(counts) == pytest.approx(normalized_mutual_info_score(labels, clusters))
    assert adjusted_rand(counts) == pytest.approx(adjusted_rand_score(labels, clusters))


def test_the_matching_is_the_best_of_all() -> None:
    counts = contingency(*groups(2), num_clusters=5, num_classes=4)
    best = max(
        sum(counts[cluster, label] for label, cluster in enumerate(chosen))
        for chosen in itertools.permutations(range(5), 4)
    )
    matched = match(counts)
    assert sorted(matched.tolist()) == [-1, 0, 1, 2, 3]
    assert counts[matched >= 0, matched[matched >= 0]].sum() == best


def test_the_edges_of_the_figures() -> None:
    one_group = np.array([[5]])
    assert mutual_information(one_group) == adjusted_rand(one_group) == 1.0
    independent = np.array([[10, 10], [10, 10]])
    assert mutual_information(independent) == pytest.approx(0)
    assert adjusted_rand(independent) < 0.0


def test_clusters_that_are_apart_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.eye(3)[labels] * 5 + 0.1 * torch.randn(90, 3, generator=generator)
    found = cluster(features, labels, num_classes=3, config=ClusteringConfig(**MODEL, runs=2, restarts=3))
    assert [measure.value for measure in found.measures] == pytest.approx([100.0, 100.0, 100.0])
    assert found.measures[0].interval == share_interval(100.0, 90)
    clusters, distance = k_means(normalize(features, dim=1), 3, iterations=20, restarts=3, seed=0)
    centres = torch.stack([normalize(features, dim=1)[clusters == number].mean(dim=0) for number in range(3)])
    expected = (normalize(features, dim=1) - centres[clusters]).square().sum(dim=1).mean().item()
    assert distance == pytest.approx(expected, abs=1e-4)


def test_the_same_seed_gives_the_same_clusters() -> None:
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    first, second = (k_means(features, 4, iterations=5, restarts=1, seed=3)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_run_is_measured_and_reported(run: Path, train: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"run={run}", f"images={train}", "baselines=true", "runs=2") == 0
    assert "matched accuracy" in capsys.readouterr().out
    report = json.loads((run / "eval" / "clustering.json").read_text())
    assert [measure["name"] for measure in report["measures"]] == ["matched_accuracy", "nmi", "ari"]
    assert report["protocol"]["clusters"] == 6
    assert report["baselines"]["raw_pixels"]["measures"][1]["value"] > 80.0  # the classes are colours


@pytest.mark.parametrize(
    ("argument", "message"), [("clusters=73", "one for each image (72). Got 73"), ("runs=0", "runs")]
)
def test_a_mistake_is_told(argument: str, message: str, train: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("backbone=raw_pixels", f"images={train}", argument) == 2
    assert message in capsys.readouterr().err


def test_labels_are_needed(
    write_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlabelled = write_shards(tmp_path / "unlabelled", [None] * 5)
    assert call("backbone=raw_pixels", f"images={unlabelled}") == 2
    assert f"{unlabelled} has no labels; clustering needs them. " in capsys.readouterr().err
