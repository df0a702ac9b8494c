"""DINOv3 against its equations, written out; its Gram teacher, sizes and backbones, and what it refuses."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.testing import assert_close

from ssl_pipeline.backbones import BackboneConfig
from ssl_pipeline.batch import RunFacts
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load
from ssl_pipeline.methods.dinov3 import DINOv3, DINOv3Config
from ssl_pipeline.modules.gram_teacher import GramConfig
from ssl_pipeline.schedule import Duration, Progress, Schedule
from tests.methods.test_dinov2 import koleo
from tests.methods.token_distillation import (
    Plain,
    batches,
    class_loss,
    logits,
    patch_loss,
    sinkhorn,
    token_method,
    tokens,
    unit,
)
from tests.methods.toys import train
from tests.tiny import CNN, VIT

SMALL = {"num_prototypes": 9, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "num_patch_prototypes": 7}
ROPE = BackboneConfig(
    name="vit_small_patch16_dinov3",
    arguments={
        "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "global_pool": "token",
    },
)  # fmt: skip


def dinov3(backbone=VIT, **changes):
    settings = SMALL | {"teacher_temperature": Schedule(value=0.05), "teacher_momentum": Schedule(value=0.8)} | changes
    return token_method(DINOv3, DINOv3Config(name="dinov3", **settings), backbone)


def gram(**settings):
    return {"gram": GramConfig(**{"weight": Schedule(value=3.0), "first": Duration(2)} | settings)}


def gram_loss(student, teacher, mask, config):
    """The mean squared difference of Gram matrices: of each image, or of all rows."""
    if config.tokens == "masked":
        pairs = [(student[mask], teacher[mask])]
    elif config.per_image:
        pairs = list(zip(student, teacher, strict=True))
    else:
        pairs = [(student.flatten(0, 1), teacher.flatten(0, 1))]
    terms = []
    for own, theirs in pairs:
        if config.normalize:
            own, theirs = unit(own), unit(theirs)
        similar, target = own @ own.T, theirs @ theirs.T
        if config.negatives != "kept":
            target = target.clamp(min=0)
        if config.negatives == "removed":
            similar = similar.clamp(min=0)
        terms.append((similar - target).square().mean())
    return sum(terms) / len(terms)


def loss_of(method):
    """The objective of DINOv3; the Gram teacher is the teacher after some steps."""
    config, kept = method.config, {}

    def loss(plain, batch, progress):
        large, small, mask = batch.views["global"], batch.views["local"], batch.masks["global"].flatten(0, 1)
        num_images, temperature = large.shape[1], config.teacher_temperature(progress)
        heads, teacher_heads = plain.student[1], plain.teacher[1]
        with torch.no_grad():
            classes, patches = tokens(plain.teacher[0], large.flatten(0, 1))
            of_classes = sinkhorn(logits(teacher_heads.classes, classes), temperature)
            of_patches = torch.zeros(*mask.shape, 7, dtype=torch.float64)
            of_patches[mask] = sinkhorn(logits(teacher_heads.patches, patches[mask]), temperature)
        classes, patches = tokens(plain.student[0], large.flatten(0, 1), mask, plain.mask_token)
        of_small, _ = tokens(plain.student[0], small.flatten(0, 1))
        student = logits(heads.classes, torch.cat([classes, of_small])) / config.student_temperature
        total = config.class_weight * class_loss(
            of_classes.unflatten(0, (-1, num_images)),
            student.unflatten(0, (-1, num_images)),
            same_crop=not config.leave_out_same_crop,
            local_weight=config.local_weight(progress),
        )
        student_patches = logits(heads.patches, patches) / config.student_temperature
        total = total + config.patch_weight * patch_loss(of_patches, student_patches, mask)
        total = total + config.koleo_weight * sum(koleo(crop) for crop in classes.unflatten(0, (-1, num_images)))
        if config.gram is None:
            return total
        step, first = progress.step, config.gram.first.steps(progress)
        every = config.gram.every.steps(progress) if config.gram.every else 1000
        if step >= first and (step - first) % every == 0 and (step - first) // every <= (config.gram.max_updates or 99):
            kept["teacher"] = deepcopy(plain.teacher[0])  # as it is after `step` steps
        if step >= first:
            with torch.no_grad():
                _, theirs = tokens(kept["teacher"], batch.views["gram"].flatten(0, 1))
                theirs = theirs.transpose(1, 2).unflatten(2, (6, 6))
                theirs = F.interpolate(theirs, size=(4, 4), mode=config.gram.resize, antialias=config.gram.antialias)
            total = total + config.gram.weight(progress) * gram_loss(
                patches, theirs.flatten(2).transpose(1, 2), mask, config.gram
            )
        return total

    return loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"leave_out_same_crop": False, "local_weight": Schedule(value=0.5), "koleo_weight": 0.3},
        gram(),
        gram(every=Duration(3), max_updates=1, per_image=False, negatives="removed"),
        gram(first=Duration(0), tokens="masked", per_image=False, negatives="teacher_removed", resize="bilinear"),
        gram(first=Duration(0), every=Duration(2), normalize=False, antialias=True, weight=Schedule(value=1e-3)),
    ],
)
def test_ten_steps_follow_the_equations(settings):
    method, given = dinov3(**settings), batches("dinov3", 10)
    plain = Plain(method)
    expected = plain.train(method, given, loss_of(method), lr=0.05)
    actual = train(method, given, lr=0.05)
    assert_close(actual, expected, rtol=1e-8, atol=1e-10)
    assert actual[-1] != actual[0]
    teacher = [*method.teacher.network.backbone.model.parameters(), *method.teacher.network.head.parameters()]
    assert_close(teacher, list(plain.teacher.parameters()), rtol=1e-7, atol=1e-9)


def test_the_prototypes_are_plain_layers():
    head = dinov3().student.head
    assert [type(layer.last_layer) for layer in (head.classes, head.patches)] == [torch.nn.Linear] * 2
    assert head.last_layers == ("classes.last_layer.", "patches.last_layer.")


def test_the_gram_teacher_is_taken_when_it_is_due():
    method, taken = dinov3(**gram(first=Duration(3), every=Duration(2), max_updates=2)), []
    method.gram_teacher.snapshot.refresh = lambda _: taken.append(step + 1)
    for step in range(12):
        method.gram_teacher.update(method.teacher.network.backbone, Progress(step, 12, 4))
    assert taken == [3, 5, 7]  # after so many steps
    assert [rule.name for rule in method.needs] == ["global", "local", "gram"]
    assert [rule.name for rule in dinov3().needs] == ["global", "local"]


def test_a_file_that_does_not_fit_is_told_with_its_key(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"^method\.gram\.teacher: .*other\.safetensors does not fit: "):
        dinov3(**gram(first=None, teacher=str(tmp_path / "other.safetensors")))


def test_a_gram_teacher_from_a_file_stays_and_is_not_saved(tmp_path):
    other = token_method(DINOv3, DINOv3Config(name="dinov3", **SMALL)).student.backbone.model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    save_file(other.state_dict(), tmp_path / "gram.safetensors")
    method = dinov3(**gram(first=None, teacher=str(tmp_path / "gram.safetensors")))
    assert_close(list(method.gram_teacher.snapshot.network.parameters()), list(other.parameters()))
    names = [name for name in method.state_dict() if name.startswith("gram_teacher")]
    assert names == ["gram_teacher.snapshot.source_sha256"]
    given = batches("dinov3", 3)
    train(method, given, lr=0.1)
    assert_close(list(method.gram_teacher.snapshot.network.parameters()), list(other.parameters()))
    assert method(given[0], Progress(0, 3, 2)).metrics["gram"] > 0
    with pytest.raises(ConfigError, match=r"^method\.gram\.teacher must be a file of weights\. There is no 'gone\.saf"):
        dinov3(**gram(first=None, teacher="gone.safetensors"))


def test_views_of_several_sizes_go_through_rope_backbones():
    method = dinov3(ROPE, **gram(first=Duration(0)))
    (batch,) = batches("dinov3", 1)
    half = {name: F.interpolate(views.flatten(0, 1), scale_factor=0.5) for name, views in batch.views.items()}
    small = {name: views.unflatten(0, batch.views[name].shape[:2]) for name, views in half.items()}
    mask = batch.masks["global"].unflatten(2, (4, 4))[:, :, ::2, ::2].flatten(2)
    mask[0, 0, 0] = True
    for views, masks in ((batch.views, batch.masks), (small, {"global": mask})):
        output = method(replace(batch, views=views, masks=masks), Progress(0, 10, 5))
        output.loss.backward()
        assert output.loss.isfinite()
        assert output.metrics["gram"] > 0
    assert method.student.backbone.model.reg_token.grad.any()
    prefixes = [rule.prefix for rule in method.param_rules()]
    assert "student.backbone.model.blocks.0." in prefixes
    assert "student.backbone.model.reg_token" in prefixes


def test_a_collapse_shows():
    method, (batch,) = dinov3(), batches("dinov3", 1)
    spread = method(batch, Progress(0, 10, 5)).metrics
    for views in batch.views.values():
        views[:] = views[:1, :1]
    collapsed = method(batch, Progress(0, 10, 5)).metrics
    assert collapsed["feature_std"] < 1e-6 < spread["feature_std"]
    assert collapsed["target_entropy"] > spread["target_entropy"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, r"needs a Gram teacher: set method\.gram\.first.* or method\.gram\.teacher=FILE\. Got neither"),
        ({"first": 1, "teacher": "file"}, r"Got both"),
        ({"teacher": "file", "every": 5}, r"every is how many steps after method\.gram\.first"),
        ({"first": 1, "max_updates": 5}, r"max_updates has no effect without method\.gram\.every"),
        ({"first": 1, "tokens": "masked"}, r"tokens=masked needs per_image=false"),
    ],
)
def test_gram_settings_that_do_not_fit_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        GramConfig(**settings)


def facts(global_batch):
    return RunFacts(100, None, global_batch, {"global": (16,)}, (0.5,) * 3, (0.5,) * 3)


def test_too_few_images_and_a_cnn_are_refused():
    with pytest.raises(
        ConfigError, match=r"^KoLeo looks for the 3 nearest other images, .* at least 4 at once\. Got 3"
    ):
        dinov3(koleo_neighbours=3).prepare(facts(3))
    with pytest.raises(ConfigError, match=r"^Sinkhorn-Knopp shares"):
        dinov3(koleo_weight=0.0).prepare(facts(1))
    dinov3(koleo_neighbours=3).prepare(facts(4))
    with pytest.raises(
        ConfigError, match=r"^DINOv3 needs a backbone with patch tokens and a class token\. 'test_resnet' does not"
    ):
        dinov3(CNN)


def recipe(name):
    return load(PretrainConfig, [f"recipe={name}"], recipes=RECIPES)


@pytest.mark.parametrize(
    ("name", "batch", "steps", "lr", "momentum"),
    [
        ("dinov3_vitl16", 2048, 125_000, 1e-3 * 2**0.5, (0.992, 1.0)),
        ("dinov3_vitl16_gram", 4096, 1_200_000, 5e-5 * 2, (0.994, 0.999)),
        ("dinov3_vitl16_highres", 2048, 30_000, 1.25e-5 * 2**0.5, (0.999, 0.999)),
    ],
)
def test_the_recipes_have_the_official_numbers(name, batch, steps, lr, momentum):
    config = recipe(name)
    assert batch % config.data.batch_size == 0
    assert config.train.steps == steps
    schedule = config.optim.effective_lr(batch)
    assert max(schedule(Progress(step, steps, 1000)) for step in range(0, steps, steps // 50)) == pytest.approx(
        lr, rel=1e-3
    )
    found = [config.method.teacher_momentum(Progress(step, steps, 1000)) for step in (0, steps)]
    assert found == pytest.approx(momentum)
    assert config.augment["global"].count == 2
    assert config.augment["local"].count == 8


def test_gram_anchoring_begins_when_the_paper_says():
    method = recipe("dinov3_vitl16_gram").method
    weights = [method.gram.weight(Progress(step, 1_200_000, 1000)) for step in (0, 999_999, 1_001_000, 1_100_000)]
    assert weights == pytest.approx([0, 0, 2, 2])
    locals_ = [method.local_weight(Progress(step, 1_200_000, 1000)) for step in (0, 999_999, 1_001_000)]
    assert locals_ == pytest.approx([1, 1, 0.5])
