"""What takes long in an evaluator is told while it lasts: a bar that counts to its end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ssl_pipeline.eval import progress
from ssl_pipeline.eval.clustering import ClusteringConfig, cluster
from ssl_pipeline.eval.dense_measures import linear_head
from ssl_pipeline.eval.dense_sets import ChosenPatches, DenseConfig
from ssl_pipeline.eval.few_shot import FewShotConfig, few_shot
from ssl_pipeline.eval.linear import ProbeConfig, linear_probe
from ssl_pipeline.eval.protocol import LabelledFeatures
from ssl_pipeline.eval.retrieval import RetrievalConfig, retrieve

LABELS = torch.arange(40) % 2
VALUES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
FEATURES = LabelledFeatures(VALUES, LABELS, VALUES[:20], LABELS[:20], num_classes=2)
MODEL = {"backbone": "raw_pixels"}
SETS = {**MODEL, "train": "a", "test": "b"}


def of_a_dense_head() -> None:
    shares = torch.nn.functional.one_hot(LABELS).float()
    patches = ChosenPatches(torch.arange(40), shares, torch.arange(40) < 10)
    linear_head(VALUES, patches, DenseConfig(**MODEL, source="a", epochs=3))


WORK: dict[str, tuple[Callable[[], object], dict[str, int]]] = {
    "dense": (of_a_dense_head, {"linear head, 5 rates": 3, "linear head, all images": 3}),
    "sgd": (
        lambda: linear_probe(FEATURES, ProbeConfig(solver="sgd", epochs=4)),
        {"linear probe, 16 settings": 4, "linear probe, 1 settings": 4},
    ),
    "logistic": (lambda: linear_probe(FEATURES, ProbeConfig(solver="logistic")), {"logistic regression": 5}),
    "few_shot": (
        lambda: few_shot(FEATURES, FewShotConfig(**SETS, per_class=(2,), fractions=("50%",), draws=2)),
        {"few-shot, 2 per class": 2, "few-shot, 50% of the labels": 2},
    ),
    "clustering": (
        lambda: cluster(VALUES, LABELS, num_classes=2, config=ClusteringConfig(**MODEL, images="a", runs=2)),
        {"k-means, 2 clusters": 2},
    ),
    "retrieval": (lambda: retrieve(FEATURES, RetrievalConfig(**SETS)), {"retrieval": 20}),
}


@pytest.mark.parametrize("name", WORK)
def test_what_takes_long_is_counted_to_its_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []
    work, expected = WORK[name]

    class Bar(progress.tqdm):
        def __init__(self, **settings: object) -> None:
            self.counted = 0
            super().__init__(**settings)
            bars.append(self)

        def update(self, n: int = 1) -> bool | None:
            self.counted += n
            return super().update(n)

    monkeypatch.setattr(progress, "tqdm", Bar)
    work()
    ended = {bar.desc.rstrip(": "): bar.counted for bar in bars if bar.counted == bar.total}
    assert ended == expected
