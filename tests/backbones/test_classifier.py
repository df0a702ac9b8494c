"""A classifier comes back from its file as it was, and other files are refused in one sentence."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from ssl_pipeline.backbones import load_classifier, save_classifier
from ssl_pipeline.config import ConfigError


@pytest.mark.parametrize("names", [None, ("Kätzchen", "dog", "")])
def test_weights_and_names_come_back(tmp_path, names):
    classifier = nn.Linear(5, 3)
    save_classifier(tmp_path, classifier, names)
    loaded, loaded_names = load_classifier(tmp_path)
    features = torch.randn(4, 5)
    assert torch.equal(loaded(features), classifier(features))
    assert loaded_names == names


def test_a_classifier_without_bias_stays_one(tmp_path):
    save_classifier(tmp_path, nn.Linear(5, 3, bias=False), None)
    assert load_classifier(tmp_path)[0].bias is None


def test_a_run_without_a_classifier_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"holds no classifier\.safetensors: the run's method does not train a classifier"
    ):
        load_classifier(tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"weight": torch.zeros(3)}, {"weight": torch.zeros(2, 3), "x": torch.ones(1)}])
def test_another_file_is_refused_in_one_line(tmp_path, tensors):
    safetensors.torch.save_file(tensors, tmp_path / "classifier.safetensors")
    with pytest.raises(ConfigError, match=r"classifier\.safetensors is not a linear classifier \(.*\)\.$") as error:
        load_classifier(tmp_path)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(tmp_path):
    save_classifier(tmp_path, nn.Linear(5, 3), None)
    file = tmp_path / "classifier.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ConfigError, match="is not a linear classifier"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.full((2, 3), float("nan")), "weight is not finite"),
        (torch.ones(2, 3, dtype=torch.int8), "weight is int8"),
    ],
)
def test_a_classifier_that_is_no_finite_floats_is_refused(tmp_path, weight, said):
    safetensors.torch.save_file({"weight": weight}, tmp_path / "classifier.safetensors")
    with pytest.raises(ConfigError, match=said):
        load_classifier(tmp_path)
