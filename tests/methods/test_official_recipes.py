"""The published numbers in the recipes of MoCo, BYOL, SimSiam and MAE."""

from __future__ import annotations

import pytest
import torch

from ssl_pipeline.backbones import create_backbone
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, load
from ssl_pipeline.methods import build_method
from ssl_pipeline.optim.optimizer import build_optimizer
from ssl_pipeline.schedule import Progress


def recipe(name):
    return load(PretrainConfig, [f"recipe={name}"], recipes=RECIPES)


def on_meta(config):
    with torch.device("meta"):
        return build_method(config.method, create_backbone(config.backbone))


# global batch, epochs, effective learning rate, warm-up, weight decay
RUNS = {
    "moco_v2_resnet50": (8, 256, 200, 0.03, 0, 1e-4),
    "moco_v3_resnet50": (16, 4096, 100, 9.6, "10ep", 1e-6),
    "moco_v3_vit_small": (32, 4096, 300, 2.4e-3, "40ep", 0.1),
    "moco_v3_vit_base": (64, 4096, 300, 2.4e-3, "40ep", 0.1),
    "byol_resnet50": (32, 4096, 1000, 3.2, "10ep", 1.5e-6),
    "simsiam_resnet50": (8, 512, 100, 0.1, 0, 1e-4),
    "mae_vitb16": (64, 4096, 1600, 2.4e-3, "40ep", 0.05),
    "cifar10_moco_resnet18": (1, 128, 200, 0.06, 0, 5e-4),
    "cifar10_moco_v3_resnet18": (1, 256, 1000, 0.3, "10ep", 1e-6),
    "cifar10_byol_resnet18": (1, 128, 200, 0.06 / 4, 0, 5e-4 * 4),  # their loss is a quarter of ours
    "cifar10_simsiam_resnet18": (1, 128, 200, 0.06, 0, 5e-4),
    "cifar10_mae_vit_tiny": (1, 256, 1000, 2e-4, "10ep", 0.05),
}
OPTIMIZERS = {  # and whether biases and norms decay too
    "sgd": {
        "moco_v2_resnet50": "all",
        "simsiam_resnet50": "all",
        "cifar10_moco_resnet18": "all",
        "cifar10_byol_resnet18": "all",
        "cifar10_simsiam_resnet18": "all",
        "cifar10_moco_v3_resnet18": "matrices",
    },
    "lars": {"moco_v3_resnet50": "matrices", "byol_resnet50": "matrices"},
    "adamw": {
        "moco_v3_vit_small": "all",
        "moco_v3_vit_base": "all",
        "mae_vitb16": "matrices",
        "cifar10_mae_vit_tiny": "matrices",
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_length_learning_rate_and_decay(name):
    config = recipe(name)
    processes, global_batch, epochs, learning_rate, warmup, weight_decay = RUNS[name]
    lr = config.optim.effective_lr(global_batch)
    assert processes * config.data.batch_size * config.train.accumulate == global_batch
    assert (config.train.epochs, lr.warmup, lr.final, lr.decay) == (epochs, warmup, 0.0, "cosine")
    assert lr.value == pytest.approx(learning_rate)
    assert (config.optim.weight_decay.value, config.optim.weight_decay.final) == (pytest.approx(weight_decay), None)
    assert lr.every == ("epoch" if config.optim.name == "sgd" and warmup == 0 else "step")
    assert config.optim.weight_decay_on == OPTIMIZERS[config.optim.name][name]
    assert config.train.sync_batch_norm == (name.endswith("resnet50") or name.startswith("moco_v3_vit"))


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("moco_v2_resnet50", 0.999, 0.999),
        ("moco_v3_resnet50", 0.99, 1.0),
        ("moco_v3_vit_small", 0.99, 1.0),
        ("byol_resnet50", 0.996, 1.0),
        ("cifar10_moco_resnet18", 0.99, 0.99),
        ("cifar10_moco_v3_resnet18", 0.99, 1.0),
        ("cifar10_byol_resnet18", 0.99, 0.99),
    ],
)
def test_momentum_of_the_teacher(name, first, last):
    momentum = recipe(name).method.teacher_momentum
    assert [momentum(Progress(step, 10, 1)) for step in (0, 10)] == pytest.approx([first, last])


@pytest.mark.parametrize(
    ("name", "crop", "colours", "blur", "solarize", "interpolation"),
    [
        ("moco_v2_resnet50", 0.2, (0.4, 0.4, 0.4, 0.1), (0.5, 0.5), (0.0, 0.0), "bilinear"),
        ("simsiam_resnet50", 0.2, (0.4, 0.4, 0.4, 0.1), (0.5, 0.5), (0.0, 0.0), "bilinear"),
        ("moco_v3_resnet50", 0.2, (0.4, 0.4, 0.2, 0.1), (1.0, 0.1), (0.0, 0.2), "bilinear"),
        ("moco_v3_vit_small", 0.08, (0.4, 0.4, 0.2, 0.1), (1.0, 0.1), (0.0, 0.2), "bilinear"),
        ("byol_resnet50", 0.08, (0.4, 0.4, 0.2, 0.1), (1.0, 0.1), (0.0, 0.2), "bicubic"),
        ("cifar10_moco_resnet18", 0.08, (0.4, 0.4, 0.4, 0.1), (0.0, 0.0), (0.0, 0.0), "bilinear"),
        ("cifar10_simsiam_resnet18", 0.2, (0.4, 0.4, 0.4, 0.1), (0.0, 0.0), (0.0, 0.0), "bilinear"),
        ("cifar10_byol_resnet18", 0.08, (0.4, 0.4, 0.2, 0.1), (0.0, 0.0), (0.0, 0.2), "bilinear"),
        ("cifar10_moco_v3_resnet18", 0.08, (0.4, 0.4, 0.2, 0.1), (0.0, 0.0), (0.0, 0.2), "bicubic"),
    ],
)
def test_views(name, crop, colours, blur, solarize, interpolation):
    view = recipe(name).augment["view"]
    assert (view.count, view.scale, view.interpolation) == (2, (crop, 1.0), interpolation)
    assert (view.brightness, view.contrast, view.saturation, view.hue) == colours
    assert (view.flip_prob, view.jitter_prob, view.gray_prob) == (0.5, 0.8, 0.2)
    assert (view.per_view(view.blur_prob), view.per_view(view.solarize_prob)) == (blur, solarize)


@pytest.mark.parametrize("name", ["mae_vitb16", "cifar10_mae_vit_tiny"])
def test_mae_only_crops_and_flips(name):
    view = recipe(name).augment["image"]
    assert (view.count, view.scale, view.interpolation, view.flip_prob) == (1, (0.2, 1.0), "bicubic", 0.5)
    assert (view.jitter_prob, view.gray_prob, view.blur_prob, view.solarize_prob) == (0.0, 0.0, 0.0, 0.0)
    assert recipe(name).optim.betas == (0.9, 0.95)


def test_mae_vitb16_has_the_official_size_and_decays_its_tokens():
    config = recipe("mae_vitb16")
    method = on_meta(config)
    sines = (196 + 1) * (768 + 512)  # fixed, in the official code parameters without gradient
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) + sines == 111_907_840
    decayed = {id(p) for g in build_optimizer(method, config.optim).param_groups if g["decays"] for p in g["params"]}
    assert {id(method.backbone.model.cls_token), id(method.decoder.mask_token)} <= decayed
    assert not any(id(p) in decayed for name, p in method.named_parameters() if p.ndim == 1 or name.endswith("bias"))


def test_moco_v3_vit_small_is_the_papers():
    method = on_meta(recipe("moco_v3_vit_small"))
    vit = method.backbone.model
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (384, 12, 12)
    untrained = {name for name, p in method.backbone.named_parameters() if not p.requires_grad}
    assert untrained == {"model.pos_embed", "model.patch_embed.proj.weight", "model.patch_embed.proj.bias"}


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("moco_v2_resnet50", False),
        ("moco_v3_resnet50", True),
        ("byol_resnet50", True),
        ("simsiam_resnet50", True),
        ("cifar10_moco_resnet18", False),
    ],
)
def test_the_last_norm_of_a_residual_block_begins_as_theirs(name, zero):
    block = create_backbone(recipe(name).backbone).model.layer1[0]
    last = block.bn3 if hasattr(block, "bn3") else block.bn2
    assert bool(last.weight.any()) == (not zero)
