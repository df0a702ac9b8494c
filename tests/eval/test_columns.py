"""What a figure owes to other settings is told in the words of these settings, and nothing else is."""

from __future__ import annotations

import pytest

from ssl_pipeline.eval.columns import measured_otherwise

SUITE = {
    "k": [20, 10, 100],
    "temperature": 0.07,
    "solver": "sgd",
    "train": "a",
    "num_train": 900,
    "train_fingerprint": "1",
    "test": "b",
    "num_test": 100,
    "test_fingerprint": "2",
    "size": 32,
    "torch": "2.6",
    "label": "pretrained",
}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"k": [20], "leave_one_out": False, "per_class": None, "seed": 0}, ""),
        ({"train": "moved", "torch": "2.7", "label": "other"}, ""),
        ({"k": [5, 20]}, "k=5"),
        ({"per_class": 2, "size": 64}, "size=64, per_class=2"),
        ({"leave_one_out": True}, "leave_one_out=true"),
        ({"num_test": 10, "test_fingerprint": "3"}, "num_test=10"),
        ({"test_fingerprint": "3"}, "other test images"),
    ],
)
def test_only_what_figures_owe_to_is_told(changed: dict[str, object], told: str) -> None:
    assert measured_otherwise(SUITE, SUITE | changed) == told
