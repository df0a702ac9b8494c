"""Fine-tuning: what learns how fast and when, what stays as it is, and which images are read."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.backbones import NormalisedLinear, Preprocessing, create_backbone, load_classifier, save_classifier
from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.config import ConfigError, validate
from ssl_pipeline.eval.features.extract import Extraction
from ssl_pipeline.eval.monitors import ClassifierMonitor, ClassifierMonitorConfig
from ssl_pipeline.methods.few_labels import FewLabels
from ssl_pipeline.methods.supervised import Supervised, SupervisedConfig
from ssl_pipeline.modules import batch_mixing
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer, prepare_gradients, write_values
from ssl_pipeline.schedule import Duration, Progress, Schedule
from tests.tiny import CNN, VIT, write_shards

FACTS = RunFacts(8, 3, 8, {"view": (16,)}, (0.5,) * 3, (0.5,) * 3)
PROGRESS = Progress(0, 10, 5)
SGD = OptimConfig(name="sgd", lr=Schedule(value=0.1), weight_decay=Schedule(value=0.1), momentum=0.0)


def fine_tuning(backbone=VIT, **settings):
    torch.manual_seed(0)
    config = SupervisedConfig(name="supervised", learns_from="all", **settings)
    method = Supervised(config, create_backbone(backbone))
    method.prepare(FACTS)
    return method


def batch_of(num_images=6):
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(1, num_images, 3, 16, 16, generator=generator)
    return Batch({"view": views}, torch.arange(num_images) % 3, torch.arange(num_images))


def rates(method):
    """(learning rate, decay) of each trained parameter in the first step, and whether it is frozen then."""
    optimizer = build_optimizer(method, SGD)
    write_values(optimizer, SGD, SGD.lr, PROGRESS)
    names = {parameter: name for name, parameter in method.named_parameters()}
    return {
        names[p].removeprefix("pair.student."): (g["lr"], g["weight_decay"], g["rule"].is_frozen(PROGRESS))
        for g in optimizer.param_groups
        for p in g["params"]
    }


def test_it_learns_the_labels_of_all_images():
    method, batch = fine_tuning(), batch_of()
    (needed,) = method.needs
    assert (needed.name, needed.labelled, needed.with_labels, needed.evaluated) == ("view", False, True, True)
    logits = method.pair.student(batch.one("view"))
    expected = torch.nn.functional.cross_entropy(logits, batch.labels)
    assert_close(method(batch, PROGRESS).loss, expected)


def test_rates_shrink_from_the_classifier_to_the_patch_embedding():
    found = rates(fine_tuning(layer_decay=0.5))
    assert found["head.weight"] == (0.1, 0.1, False)
    assert found["backbone.model.norm.weight"] == (0.1, 0.0, False)
    assert found["backbone.model.blocks.0.attn.qkv.weight"] == (0.05, 0.1, False)
    assert found["backbone.model.patch_embed.proj.weight"] == (0.025, 0.1, False)
    assert found["backbone.model.pos_embed"] == (0.025, 0.0, False)  # 3-D, and yet without decay


def test_rates_of_a_cnn_shrink_block_by_block():
    found = rates(fine_tuning(CNN, layer_decay=0.5))
    last = [rate for name, (rate, _, _) in found.items() if ".layer4." in name]
    assert set(last) == {0.05}
    assert found["backbone.model.conv1.weight"][0] == pytest.approx(0.1 * 0.5**5)  # test_resnet: stem and four blocks


def test_one_layer_after_the_other_begins_to_learn():
    method = fine_tuning(unfreeze_every=Duration(2))
    optimizer = build_optimizer(method, SGD)
    names = {parameter: name for name, parameter in method.named_parameters()}
    learning = []
    for step in range(5):
        progress = Progress(step, 10, 5)
        method(batch_of(), progress).loss.backward()
        prepare_gradients(optimizer, SGD, progress)
        learning.append({names[p] for g in optimizer.param_groups for p in g["params"] if p.grad is not None})
        optimizer.zero_grad()
    block, stem = "pair.student.backbone.model.blocks.0.norm1.weight", "pair.student.backbone.model.cls_token"
    assert [block in names for names in learning] == [False, False, True, True, True]
    assert [stem in names for names in learning] == [False, False, False, False, True]
    assert all("pair.student.head.weight" in names for names in learning)


@pytest.mark.parametrize(("written", "factor", "expected"), [(3, 4, 12), ("2ep", 3, 30), ("1.5%", 2, 3), (0, 7, 0)])
def test_a_duration_many_times(written, factor, expected):
    assert Duration(written).times(factor).steps(Progress(0, 100, 5)) == expected


def test_a_frozen_backbone_stays_as_it_is():
    method = fine_tuning(CNN.model_copy(update={"drop_path": 0.5}), frozen_backbone=True)
    method.train()
    before = {name: tensor.clone() for name, tensor in method.pair.student.backbone.state_dict().items()}
    assert {name for name, p in method.named_parameters() if p.requires_grad} == {
        "pair.student.head.weight",
        "pair.student.head.bias",
    }
    first, second = (method(batch_of(), PROGRESS) for _ in range(2))
    assert torch.equal(first.loss, second.loss)  # no drop path
    first.loss.backward()
    build_optimizer(method, SGD).step()
    after = method.pair.student.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # no new statistics either
    assert method.pair.student.head.weight.grad.any()


def test_what_a_frozen_backbone_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"layer_decay needs a backbone that learns"):
        validate(SupervisedConfig, {"name": "supervised", "frozen_backbone": True, "layer_decay": 0.5})
    assert validate(SupervisedConfig, {"name": "supervised", "frozen_backbone": True, "layer_decay": 1.0})


@pytest.mark.parametrize(
    ("settings", "draw", "kind"),
    [
        ({}, 0.4, "mixup"),
        ({}, 0.6, "cutmix"),
        ({"cutmix_share": 0.9}, 0.2, "cutmix"),
        ({"mixing_share": 0.3}, 0.4, "none"),
        ({"mixing_share": 0.7, "cutmix_share": 0.0}, 0.4, "mixup"),
    ],
)
def test_a_batch_is_mixed_in_one_way_or_not_at_all(settings, draw, kind, monkeypatch):
    from ssl_pipeline.methods import supervised

    monkeypatch.setattr(supervised, "draw_for_all", lambda device: torch.tensor(draw))
    method, batch = fine_tuning(mixup_alpha=1.0, cutmix_alpha=1.0, **settings), batch_of()
    images = batch.one("view")
    torch.manual_seed(3)
    mixed, targets = method._mixed(images, batch.labels)
    torch.manual_seed(3)
    plain = batch_mixing.as_targets(batch.labels, 3, dtype=images.dtype)
    by_mixup = batch_mixing.mixup_global_batch([images], [plain], alpha=1.0)
    by_cutmix = batch_mixing.cutmix_global_batch([images], [plain], alpha=1.0)
    expected = {"mixup": by_mixup, "cutmix": by_cutmix, "none": ([images], [plain])}[kind]
    assert torch.equal(mixed, expected[0][0])
    assert torch.equal(targets, expected[1][0])


def test_batch_norm_before_the_classifier_goes_into_what_is_exported(tmp_path):
    method, batch = fine_tuning(frozen_backbone=True, head_batch_norm=True), batch_of()
    for _ in range(3):
        method(batch, PROGRESS)
        method.after_step([], PROGRESS)
    head = method.classifier
    assert head.norm.running_mean.any()  # the teacher's follow the student's
    features = method.backbone(batch.one("view"))
    save_classifier(tmp_path, head, None)
    exported, _ = load_classifier(tmp_path)
    head.eval()
    assert_close(exported(features), head(features))
    assert not torch.allclose(exported.weight, head.weight)


def test_a_classifier_is_measured_in_evaluation_mode(tmp_path):
    write_shards(tmp_path / "val", (6,))
    classifier = NormalisedLinear(48, 3)
    settings = ClassifierMonitorConfig(every=Duration(0), val=str(tmp_path / "val"))
    extraction = Extraction(Preprocessing(4, (0.5,) * 3, (0.5,) * 3), batch_size=2, workers=0)
    monitor = ClassifierMonitor(settings, extraction, classifier=classifier, num_classes=3)
    before = classifier.norm.running_mean.clone()
    monitor(torch.nn.Flatten(), PROGRESS)
    assert torch.equal(classifier.norm.running_mean, before)
    assert classifier.training


def test_what_all_classifiers_share_stands_in_one_place():
    own = vars(Supervised).keys() | SupervisedConfig.__annotations__.keys()
    shared = {"prepare", "backbones", "classifier", "after_step", "num_classes", "teacher_momentum"}
    assert not own & shared
    assert issubclass(Supervised, FewLabels)
