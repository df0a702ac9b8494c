"""Every method for few labels learns three classes from three labels of each, and says what it cannot know."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.schedule import Progress
from ssl_pipeline.training.remarks import about_soft_labels
from tests import tiny
from tests.methods.toys import descend, toy_method
from tests.tiny import CLASSES, CONFIGS, make_batch, make_method, needs

FEW_LABELS = sorted(name for name in CONFIGS if any(views.labelled for views in needs(name)))
STEPS = 150
OWN: dict[str, dict[str, object]] = {  # ramps for so short a run, and the average that is evaluated
    "co_training": {"threshold": 0.7},
    "fixmatch": {"threshold": 0.7},
    "flexmatch": {"threshold": 0.7},
    "mean_teacher": {"consistency_weight": {"value": 3.0, "warmup": "40%"}},
    "mixmatch": {"unlabelled_weight": {"value": 3.0, "warmup": "100%"}},
    "pi_model": {"consistency_weight": {"value": 3.0, "warmup": "40%"}},
    "temporal_ensembling": {"consistency_weight": {"value": 3.0, "warmup": "40%"}},
}


def images_of(labels: torch.Tensor, generator: torch.Generator, views: int) -> torch.Tensor:
    """(V, B, 3, 2, 2): each class has a colour, under noise that is drawn for each view."""
    colours = 2.0 * torch.eye(3, dtype=torch.float64)[labels][:, :, None, None]
    noise = torch.randn(views, len(labels), 3, 2, 2, dtype=torch.float64, generator=generator)
    return colours + noise


def batch_of(name: str, generator: torch.Generator) -> Batch:
    labels, known = torch.randint(0, 3, (24,), generator=generator), torch.arange(9) % 3
    drawn: dict[bool, dict[str, torch.Tensor]] = {False: {}, True: {}}
    for group in needs(name):
        drawn[group.labelled][group.name] = images_of(known if group.labelled else labels, generator, group.count or 2)
    ids = torch.randint(0, 60, (24,), generator=generator)
    return Batch(drawn[False], labels, ids, labelled=Batch(drawn[True], known, torch.arange(9)))


@pytest.mark.parametrize("name", [name for name in FEW_LABELS if name not in ("co_training", "remixmatch")])
def test_three_labels_of_each_class_are_enough_for_three_colours(name: str) -> None:
    settings = {"name": name, "num_classes": 3, "teacher_momentum": {"value": 0.9}, **OWN.get(name, {})}
    method = toy_method(CLASSES[name], CONFIGS[name](**settings))
    method.prepare(RunFacts(60, 3, 24, {"weak": (2,), "strong": (2,)}, (0.5,) * 3, (0.5,) * 3))
    method.double()
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    for step in range(STEPS):
        progress = Progress(step, STEPS, 10)
        output = method(batch_of(name, generator), progress)
        method.zero_grad()
        output.loss.backward()
        descend(method, 0.3)
        with torch.no_grad():
            method.after_step([output.carry], progress)
    method.eval()
    labels = torch.arange(300) % 3
    with torch.no_grad():
        guesses = method.classifier(method.backbone(images_of(labels, generator, 1)[0])).argmax(dim=1)
    assert (guesses == labels).float().mean() > 0.95


@pytest.mark.parametrize("name", FEW_LABELS)
def test_a_class_without_a_label_stops_nothing(name: str) -> None:
    method, batch = make_method(name), make_batch(name)
    assert batch.labelled is not None
    fewer = replace(batch, labelled=replace(batch.labelled, labels=batch.labelled.labels.clamp(max=1)))
    output = method(fewer, Progress(1, 10, 5))
    output.loss.backward()
    assert all(math.isfinite(value) for value in (output.loss.item(), *map(float, output.metrics.values())))


OTHER_SETTINGS = {"pi_model": {"form": "detached"}, "uda": {"annealing": "none"}}


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in FEW_LABELS), *OTHER_SETTINGS.items()], ids=lambda part: str(part)
)
def test_a_method_says_whether_it_learns_more_of_soft_labels_than_their_class(
    name: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.OWN, name, tiny.OWN.get(name, {}) | settings)
    batch, losses = make_batch(name), []
    assert batch.labelled is not None
    hard = nn.functional.one_hot(batch.labelled.labels, 3).float()
    for labels in (hard, 0.7 * hard + 0.1):
        torch.manual_seed(5)
        method = make_method(name)
        losses.append(method(replace(batch, labelled=replace(batch.labelled, labels=labels)), Progress(1, 10, 5)).loss)
    assert torch.equal(*losses) == method.hardens_labels
    soft = Mock(spec=ShardIndex, num_soft_classes=3, called="few")
    assert (about_soft_labels(method, soft) is not None) == method.hardens_labels
    assert about_soft_labels(method, Mock(spec=ShardIndex, num_soft_classes=None, called="few")) is None


@pytest.mark.parametrize("name", FEW_LABELS)
@pytest.mark.parametrize("label", [-1, 7])
def test_images_of_unknown_classes_count_as_wrong_in_metrics_alone(name: str, label: int) -> None:
    losses, metrics = [], []
    for labels in (make_batch(name).labels, torch.full((4,), label)):
        torch.manual_seed(5)
        output = make_method(name)(replace(make_batch(name), labels=labels), Progress(1, 10, 5))
        losses.append(output.loss.detach())
        metrics.append(output.metrics)
    assert torch.equal(*losses)
    told = [key for key in metrics[1] if key.endswith("_right")]
    assert [float(metrics[1][key]) for key in told] == [0.0] * len(told)
