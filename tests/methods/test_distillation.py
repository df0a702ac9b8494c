"""Distillation against plain steps, its teachers of all origins, and students without tokens."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, save_backbone
from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.files import write_tensors
from ssl_pipeline.methods.distillation import Distillation, DistillationConfig, load_teacher, resampled
from ssl_pipeline.optim.optimizer import OptimConfig, build_optimizer
from ssl_pipeline.run.checkpoints import Checkpoints
from ssl_pipeline.run.state import RunState, SavedBackbone
from ssl_pipeline.schedule import Progress, Schedule
from tests.methods.toys import assert_same_tensors, descend, train
from tests.tiny import CNN, VIT, teacher_settings

PROGRESS = Progress(0, 1, 1)
HALF = (0.5, 0.5, 0.5)
TEACHER: BackboneConfig = teacher_settings()["teacher"]


def facts(**sizes):
    return RunFacts(100, None, 8, {name: (size,) for name, size in sizes.items()}, HALF, HALF)


def distillation(student=VIT, *, teacher=TEACHER, sizes=None, **changes):
    torch.manual_seed(0)
    config = DistillationConfig(name="distillation", teacher=teacher, **changes)
    method = Distillation(config, create_backbone(student))
    method.prepare(facts(**(sizes or {"image": 16})))
    return method.double()


def batches(num_steps, *, count=3, **others):
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        sizes = {"image": 16, **others}
        views = {
            name: torch.randn(1, count, 3, size, size, generator=generator, dtype=torch.float64)
            for name, size in sizes.items()
        }
        yield Batch(views, torch.full((count,), -1), torch.arange(count))


def unit(rows):
    return rows / rows.square().sum(dim=-1, keepdim=True).sqrt()


@pytest.mark.parametrize("student", [VIT, CNN], ids=["vit", "cnn"])
def test_ten_steps_follow_the_formula(student):
    method = distillation(student, class_weight=0.7, patch_weight=1.3, patch_distance="smooth_l1")
    teacher = create_backbone(TEACHER).double().eval()
    network = deepcopy(method.student)
    heads = nn.ModuleList(deepcopy([method.class_projector[0], method.patch_projector[0]]))
    losses = []
    for batch in batches(10):
        images = batch.views["image"][0]
        with torch.no_grad():
            tokens = teacher.model.forward_features(images)
            target, target_map = tokens[:, 0], tokens[:, 1:].transpose(1, 2).reshape(3, 20, 8, 8)
        if student is VIT:
            tokens = network.model.norm(
                network.model.blocks(network.model._pos_embed(network.model.patch_embed(images)))
            )
            features, patches = tokens[:, 0], tokens[:, 1:]
        else:
            its_map = network.model.forward_features(images)
            features, patches = its_map.mean(dim=(2, 3)), its_map.flatten(2).transpose(1, 2)
        side = round(patches.shape[1] ** 0.5)
        targets = F.interpolate(target_map, size=(side, side), mode="bilinear", antialias=True)
        class_loss = (1 - (unit(heads[0](features)) * unit(target)).sum(dim=1)).mean()
        gap = (heads[1](patches) - targets.flatten(2).transpose(1, 2)).abs()
        patch_loss = torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()
        loss = 0.7 * class_loss + 1.3 * patch_loss
        trained = nn.ModuleList([network, heads])
        trained.zero_grad()
        loss.backward()
        descend(trained, lr=0.1)
        losses.append(loss.detach())

    torch.testing.assert_close(train(method, batches(10), lr=0.1), torch.stack(losses))
    assert_same_tensors(method.student, network)
    assert_same_tensors(method.patch_projector[0], heads[1])
    assert losses[-1] < losses[0]


def test_a_coarser_grid_takes_the_mean_over_what_a_place_stands_for():
    fine = torch.zeros(1, 1, 8, 8)
    fine[0, 0, :4] = 1.0
    coarse = resampled(fine, (2, 2))
    assert coarse[0, 0, 0].min() > 0.8
    assert coarse[0, 0, 1].max() < 0.2
    torch.testing.assert_close(coarse.mean(), fine.mean())
    assert resampled(fine, (8, 8)) is fine


def test_the_teacher_sees_its_own_group_where_there_is_one():
    method = distillation(sizes={"image": 16, "teacher": 32})
    (batch,) = batches(1, teacher=32)
    alone = method(Batch({"image": batch.views["image"]}, batch.labels, batch.sample_ids), PROGRESS).loss
    both = method(batch, PROGRESS).loss
    assert not torch.equal(alone, both)
    batch.views["teacher"][:] = 0
    assert not torch.equal(method(batch, PROGRESS).loss, both)


def test_without_the_patch_loss_there_is_no_patch_projector():
    method, (batch,) = distillation(patch_weight=0.0), batches(1)
    output = method(batch, PROGRESS)
    assert not hasattr(method, "patch_projector")
    assert output.metrics.keys() == {"class_cosine", "feature_std"}


def test_the_teacher_is_not_trained_not_saved_and_the_same_in_training():
    method, (batch,) = distillation(), batches(1)
    assert {name.split(".")[0] for name in method.state_dict()} >= {"student", "class_projector", "teacher"}
    assert [name for name in method.state_dict() if name.startswith("teacher")] == ["teacher.source_sha256"]
    assert not any(name.startswith("teacher") for name, _ in method.named_parameters())
    assert not method.train().teacher.network.training
    first = method(batch, PROGRESS).metrics["class_cosine"]
    assert -1 <= first <= 1


def test_a_student_that_agrees_has_no_loss():
    student = TEACHER.model_copy(update={"weights": TEACHER.weights})
    method = distillation(student)
    for projector in (method.class_projector, method.patch_projector):
        nn.init.eye_(projector[0].weight)
        nn.init.zeros_(projector[0].bias)
    (batch,) = batches(1)
    output = method(batch, PROGRESS)
    assert output.loss.item() == pytest.approx(0, abs=1e-6)
    assert output.metrics["class_cosine"].item() == pytest.approx(1)
    assert output.metrics["patch_cosine"].item() == pytest.approx(1)


def test_a_collapse_shows():
    method, (batch,) = distillation(), batches(1)
    assert method(batch, PROGRESS).metrics["feature_std"] > 0.01
    batch.views["image"][:] = batch.views["image"][:, :1]
    assert method(batch, PROGRESS).metrics["feature_std"] < 1e-6


# teachers


def test_a_run_is_a_teacher_with_its_weights_and_normalisation(tmp_path):
    torch.manual_seed(3)
    saved = create_backbone(CNN)
    save_backbone(tmp_path, saved, Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    config = CNN.model_copy(update={"weights": str(tmp_path)})
    teacher, source, expected = load_teacher(config)
    torch.testing.assert_close(teacher.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert source == tmp_path / "backbone.safetensors"
    with pytest.raises(ConfigError, match=r"trained on images with mean \[0\.1, .*set augment\.image\.mean and \.std"):
        distillation(teacher=config)
    assert expected is not None
    method = Distillation(DistillationConfig(name="distillation", teacher=config), create_backbone(VIT))
    fitting = RunFacts(100, None, 8, {"image": (16,), "teacher": (16,)}, HALF, HALF)
    groups = {"group_mean": {"teacher": expected.mean}, "group_std": {"teacher": expected.std}}
    method.prepare(RunFacts(**{**vars(fitting), **groups}))
    assert "teacher.source_sha256" in method.state_dict()


def test_a_run_that_has_not_ended_is_a_teacher_from_its_newest_checkpoint(tmp_path):
    torch.manual_seed(3)
    saved = create_backbone(CNN)
    about = SavedBackbone("encoder.", CNN.model_dump(mode="json"), 16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    tensors = {f"encoder.{name}": tensor for name, tensor in saved.state_dict().items()}
    Checkpoints(tmp_path / "checkpoints").save(RunState(2, 1, backbones={"encoder": about}), {"method": tensors})
    teacher, source, expected = load_teacher(CNN.model_copy(update={"weights": str(tmp_path)}))
    torch.testing.assert_close(teacher.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert source == str(tmp_path)
    assert expected == Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_file_beside_a_model_card_is_a_teacher_with_its_normalisation(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {name: value.contiguous() for name, value in create_backbone(CNN).model.state_dict().items()})
    config = CNN.model_copy(update={"weights": str(path)})
    assert load_teacher(config)[2] is None  # nothing says it, so nothing is refused
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}')
    with pytest.raises(ConfigError, match=r"The teacher was trained on images with mean \[0\.1, 0\.2, 0\.3\]"):
        distillation(teacher=config)


def test_a_run_of_another_network_is_refused(tmp_path):
    save_backbone(tmp_path, create_backbone(CNN), Preprocessing(16, HALF, HALF))
    with pytest.raises(ConfigError, match=r"^method\.teacher must be the network of .*test_resnet.* Got .*vit_tiny"):
        load_teacher(VIT.model_copy(update={"weights": str(tmp_path)}))


def test_a_folder_without_an_export_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is a directory without weights: it has no checkpoints of a run"):
        load_teacher(CNN.model_copy(update={"weights": str(tmp_path)}))


def test_a_teacher_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"teacher\.weights is missing: a trained network is distilled"):
        DistillationConfig(name="distillation", teacher=VIT)


def test_a_network_without_a_map_is_refused_unless_patches_do_not_count():
    xcit = BackboneConfig(name="xcit_nano_12_p16_224")
    with pytest.raises(ConfigError, match=r"^'xcit_nano_12_p16_224' has no feature map\. Networks with one: CNNs"):
        distillation(xcit)
    distillation(xcit, patch_weight=0.0)


def test_a_teacher_of_one_size_is_refused_for_another(tmp_path):
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    beit = BackboneConfig(name="beit_base_patch16_224", arguments=arguments)
    network = create_backbone(beit)
    path = tmp_path / "beit.safetensors"
    write_tensors(path, network.model.state_dict())
    with pytest.raises(ConfigError, match=r"its own size, 16x16\. Got 32x32\. Try method\.teacher\.arguments\.img_"):
        distillation(teacher=beit.model_copy(update={"weights": str(path)}), sizes={"image": 32})


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "mobilenetv3_small_050"])
def test_maps_of_networks(name):
    backbone = create_backbone(BackboneConfig(name=name)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, its_map = backbone.features_and_map(images)
        torch.testing.assert_close(features, backbone(images))
    assert (its_map.shape[1], tuple(its_map.shape[2:])) == backbone.map_shape(64)
    assert not its_map.is_meta
    assert features.shape[1] == backbone.embed_dim


def test_a_token_networks_map_has_its_patches():
    backbone = create_backbone(TEACHER).eval()
    features, its_map = backbone.features_and_map(torch.randn(2, 3, 16, 16))
    assert features.shape == (2, 20)
    assert (its_map.shape[1], tuple(its_map.shape[2:])) == backbone.map_shape(16) == (20, (8, 8))


# settings


def test_rates_shrink_towards_the_input():
    method = distillation(layer_decay=0.5, patch_embed_lr_scale=0.2)
    optimizer = build_optimizer(method, OptimConfig(name="adamw", lr=Schedule(value=1.0)))
    scales = {id(p): group["rule"].lr_scale for group in optimizer.param_groups for p in group["params"]}
    named = dict(method.named_parameters())
    assert scales[id(named["student.model.patch_embed.proj.weight"])] == pytest.approx(0.25 * 0.2)
    assert scales[id(named["student.model.blocks.0.mlp.fc1.weight"])] == 0.5
    assert scales[id(named["class_projector.0.weight"])] == 1


def test_the_recipe_has_what_is_published():
    config = load(PretrainConfig, ["recipe=dinov3_distill_vits16"], recipes=RECIPES)
    processes = 48
    view, method = config.augment["image"], config.method
    assert processes * config.data.batch_size * config.train.accumulate == 1920
    assert (view.count, view.size, view.scale, view.flip_prob) == (2, 256, (0.32, 1.0), 0.0)
    assert (config.optim.weight_decay.value, config.optim.weight_decay.final, config.optim.clip_norm) == (
        0.04,
        None,
        3.0,
    )
    assert (method.layer_decay, method.patch_embed_lr_scale) == (0.99, 0.2)
    lr = config.optim.effective_lr(1920)
    steps = {step: lr(Progress(step, 1_250_000, 1000)) for step in (0, 999_999, 1_000_000, 1_250_000)}
    peak = 2e-4 * (1920 / 1024) ** 0.5
    assert steps == pytest.approx({0: peak, 999_999: peak, 1_000_000: peak, 1_250_000: 5e-5}, rel=1e-3)
