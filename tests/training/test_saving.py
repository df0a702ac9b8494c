"""A checkpoint says which of its tensors are a backbone's, and which the classifier's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssl_pipeline.backbones import BackboneConfig, Preprocessing
from ssl_pipeline.batch import RunFacts
from ssl_pipeline.config import validate
from ssl_pipeline.training.saving import run_state, saved_backbones, saved_classifier
from tests.runs import make_run
from tests.tiny import CONFIGS, VIT, make_method, write_shards

PREPROCESSING = Preprocessing(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_prefixes_pick_the_tensors_of_each_backbone(name):
    method = make_method(name)
    saved = saved_backbones(method, PREPROCESSING)
    assert list(saved) == list(method.backbones())
    for part, backbone in method.backbones().items():
        found = below(saved[part].prefix, method.state_dict())
        torch.testing.assert_close(found, backbone.state_dict(), rtol=0, atol=0)
        assert validate(BackboneConfig, dict(saved[part].config)) == VIT
        assert Preprocessing(saved[part].size, saved[part].mean, saved[part].std) == PREPROCESSING


def test_a_classifier_has_its_place_and_its_classes():
    method = make_method("fixmatch")
    method.prepare(RunFacts(48, 3, 8, {"weak": (16,), "strong": (16,)}, (0, 0, 0), (1, 1, 1), ("a", "b", "c")))
    saved = saved_classifier(method, ("a", "b", "c"))
    assert (saved.num_classes, saved.class_names) == (3, ("a", "b", "c"))
    found = below(saved.prefix, method.state_dict())
    torch.testing.assert_close(found, method.classifier.state_dict(), rtol=0, atol=0)


def test_methods_without_a_classifier_save_none():
    assert saved_classifier(make_method("simclr"), None) is None


def test_the_state_of_a_run_follows_its_position(tmp_path: Path):
    run = make_run(tmp_path / "run", "simclr", write_shards(tmp_path / "shards"))
    state = run_state(run, position=24, identity={"seed": "0"})
    assert (state.position, state.global_batch, state.step) == (24, 8, 3)
    assert (state.identity, state.scaler, state.classifier) == ({"seed": "0"}, None, None)
