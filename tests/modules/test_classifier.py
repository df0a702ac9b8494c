"""The classifier in training and its moving average."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssl_pipeline.batch import RunFacts
from ssl_pipeline.config import ConfigError
from ssl_pipeline.modules.classifier import ClassifierPair, are_right
from tests.methods.toys import ToyBackbone, assert_same_tensors, copies

FACTS = RunFacts(6, 4, 6, {"weak": (2,), "strong": (2,), "other": (2, 3)}, (0.5,) * 3, (0.5,) * 3)


def pair_of(num_classes=3, **settings):
    torch.manual_seed(0)
    return ClassifierPair(ToyBackbone(), num_classes, **settings).double()


def images(*counts):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, 2, 2, generator=generator, dtype=torch.float64) for count in counts]


def test_several_parts_go_through_in_one_pass():
    pair, parts = pair_of(), images(2, 3, 4)
    student = copies(pair.student)[0]
    whole = student.backbone(torch.cat(parts))
    features, logits = pair(*parts)
    assert_close(features, whole)
    assert_close(logits, student.head(whole).split([2, 3, 4]))
    assert_same_tensors(pair.student, student)  # the statistics too
    one_by_one = torch.cat([student(part) for part in parts])
    assert (torch.cat(logits) - one_by_one).abs().max() > 0.01, "batch norm has to see one distribution"


@pytest.mark.parametrize("buffers", ["copy", "own"])
def test_the_teacher_follows_and_is_what_is_evaluated(buffers):
    pair = pair_of(buffers=buffers)
    assert_same_tensors(pair.teacher.network, pair.student)
    before = copies(pair.student)[0]
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.add_(1)
    pair(*images(5))  # the student's statistics move
    pair.update(0.75)
    for own, old in zip(pair.teacher.parameters(), before.parameters(), strict=True):
        assert_close(own, old + 0.25)
        assert not own.requires_grad
    same = [torch.equal(*both) for both in zip(pair.teacher.buffers(), pair.student.buffers(), strict=True)]
    assert all(same) == (buffers == "copy")
    assert pair.classifier is pair.teacher.network.head
    assert list(pair.backbones()) == ["teacher", "student"]
    assert pair.backbones()["teacher"] is pair.teacher.network.backbone
    assert pair.backbones()["student"] is pair.student.backbone


def test_without_a_number_the_classes_are_those_of_the_labelled_images():
    pair = pair_of(None)
    assert list(pair.parameters()) == []
    assert pair.prepare(FACTS, None, one_pass=("weak", "strong")) == 4
    assert pair.classifier.out_features == 4
    known = pair_of(4)
    classifier = known.classifier
    assert known.prepare(FACTS, 4, one_pass=("weak", "strong")) == 4
    assert known.classifier is classifier


def test_what_does_not_fit_is_told():
    with pytest.raises(ConfigError, match=r"^method.num_classes must be the number of classes .* 4\. Got 3;"):
        pair_of(3).prepare(FACTS, 3, one_pass=())
    with pytest.raises(ConfigError, match=r"not known without labelled images"):
        pair_of(3).prepare(replace(FACTS, num_classes=None), 3, one_pass=())
    with pytest.raises(ConfigError) as error:
        pair_of().prepare(FACTS, 4, one_pass=("weak", "other"))
    assert str(error.value) == "augment.weak.size and augment.other.size must be the same. Got 2 and 2 or 3."


def test_the_classifier_begins_xavier_normal():
    torch.manual_seed(0)
    backbone = ToyBackbone()
    backbone.embed_dim = 300
    classifier = ClassifierPair(backbone, 200).student.head
    assert isinstance(classifier, nn.Linear)
    assert classifier.weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.02)
    assert not classifier.bias.any()


def test_guesses_are_compared_with_labels_of_either_kind():
    guesses = torch.tensor([0, 2, 1])
    assert are_right(guesses, torch.tensor([0, -1, 2])).tolist() == [True, False, False]
    assert are_right(guesses, torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])).tolist() == [
        True,
        True,
        False,
    ]
    assert are_right(torch.tensor([0, 0, 1]), torch.zeros(3, 3)).tolist() == [False] * 3, "a row of 0 is no label"
