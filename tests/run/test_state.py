"""The facts of a checkpoint come back as they were, or are refused by name."""

from __future__ import annotations

import json

import pytest

from ssl_pipeline.run.state import CheckpointError, RunState, SavedBackbone, SavedClassifier

BACKBONES = {
    "teacher": SavedBackbone("teacher.network.backbone.", {"name": "resnet18"}, 32, (0.5, 0.4, 0.3), (1.0, 1.0, 1.0)),
    "student": SavedBackbone("student.backbone.", {"arguments": {"img_size": 8}}, 8, (0.0, 0.0, 0.0), (0.1, 0.2, 0.3)),
}
CLASSIFIER = SavedClassifier("teacher.network.head.", 2, ("cat", "dog"))
SCALER = {"scale": 65536.0, "growth_interval": 2000, "_growth_tracker": 7}
WHOLE = RunState(130, 32, {"method": "fixmatch", "seed": "0"}, BACKBONES, CLASSIFIER, SCALER)


@pytest.mark.parametrize("state", [WHOLE, RunState(0, 1)], ids=["whole", "smallest"])
def test_facts_survive_json(state):
    read = RunState.from_facts(json.loads(json.dumps(state.to_facts())))
    assert read == state
    assert list(read.backbones) == list(state.backbones), "the first is the exported one"
    for name, value in (state.scaler or {}).items():
        assert type(read.scaler[name]) is type(value)


def test_steps_are_counted_in_whole_batches():
    assert [RunState(position, 32).step for position in (0, 31, 32, 130)] == [0, 0, 1, 4]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"position": None}, "position"),
        ({"position": -1}, "position"),
        ({"position": "130"}, "position"),
        ({"position": True}, "position"),
        ({"global_batch": 0}, "global_batch"),
        ({"identity": {"seed": 0}}, "identity.seed"),
        ({"backbones": {"teacher": {"prefix": "a."}}}, "backbones.teacher.config"),
        ({"classifier": {"prefix": "a.", "num_classes": 0, "class_names": None}}, "classifier.num_classes"),
    ],
)
def test_a_wrong_fact_is_named(change, name):
    with pytest.raises(CheckpointError, match=rf"^its fact '{name}' cannot be read \(.*\)\.$"):
        RunState.from_facts(WHOLE.to_facts() | change)


def test_a_missing_fact_is_named():
    facts = WHOLE.to_facts()
    del facts["global_batch"]
    with pytest.raises(CheckpointError, match="'global_batch'"):
        RunState.from_facts(facts)
