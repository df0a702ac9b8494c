"""Class tokens of the last blocks as features (DINO's linear evaluation): timm's own, and what takes them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, load_backbone, save_backbone
from ssl_pipeline.backbones.networks import require_tokens
from ssl_pipeline.batch import Batch, RunFacts
from ssl_pipeline.config import ConfigError, validate
from ssl_pipeline.eval.export import ExportConfig, export
from ssl_pipeline.eval.features.kinds import FeatureKinds
from ssl_pipeline.methods.supervised import Supervised, SupervisedConfig
from ssl_pipeline.schedule import Progress
from tests.backbones.tiny_vit import TINY_VIT, images

DEEP = TINY_VIT | {"depth": 5}
WIDTH = 48


def vit(**settings):
    torch.manual_seed(0)
    return create_backbone(BackboneConfig(name="vit_tiny_patch16_224", arguments=DEEP, **settings)).eval()


def timms_own(backbone, pixels, *, blocks, patch_mean):
    """What DINO's eval_linear.py puts together, from timm's get_intermediate_layers."""
    layers = backbone.model.get_intermediate_layers(pixels, n=blocks, return_prefix_tokens=True, norm=True)
    parts = [prefix[:, 0] for _, prefix in layers]
    return torch.cat([*parts, layers[-1][0].mean(dim=1)] if patch_mean else parts, dim=1)


@pytest.mark.parametrize(("blocks", "patch_mean"), [(4, False), (1, True), (5, True)])
@torch.no_grad()
def test_features_are_the_class_tokens_of_the_last_blocks_after_the_norm(blocks, patch_mean):
    backbone, pixels = vit(class_tokens=blocks, patch_mean=patch_mean), images()
    expected = timms_own(backbone, pixels, blocks=blocks, patch_mean=patch_mean)
    assert backbone.embed_dim == expected.shape[1] == WIDTH * (blocks + patch_mean)
    features = backbone(pixels)
    assert_close(features, expected)
    pooled, patches = backbone.features_and_map(pixels)
    assert torch.equal(pooled, features)
    assert patches.shape == (2, *backbone.map_shape(32)[:1], *backbone.map_shape(32)[1])
    kinds = FeatureKinds(backbone, ("pooled", "blocks", "patches"), last_blocks=2)(pixels)
    assert_close(kinds["pooled"], features)
    assert_close(kinds["blocks"], timms_own(backbone, pixels, blocks=2, patch_mean=False))


@torch.no_grad()
def test_the_head_is_given_them_and_the_backbone_stays():
    method = Supervised(
        SupervisedConfig(name="supervised", learns_from="all", frozen_backbone=True), vit(class_tokens=4)
    )
    method.prepare(RunFacts(8, 3, 8, {"view": (32,)}, (0.5,) * 3, (0.5,) * 3))
    given = []
    method.pair.student.head.register_forward_pre_hook(lambda head, inputs: given.append(inputs[0]))
    pixels = images()
    method(Batch({"view": pixels[None]}, torch.tensor([0, 1]), torch.arange(2)), Progress(0, 10, 5))
    assert_close(given[0], timms_own(method.backbone, pixels, blocks=4, patch_mean=False))
    assert method.classifier.in_features == 4 * WIDTH


def test_they_are_the_features_of_what_is_exported(tmp_path):
    backbone = vit(class_tokens=2, patch_mean=True)
    save_backbone(tmp_path / "run", backbone, Preprocessing(32, (0.5,) * 3, (0.5,) * 3))
    loaded, _ = load_backbone(tmp_path / "run")
    assert torch.equal(loaded.eval()(images()), backbone(images()))
    with pytest.raises(ConfigError, match=r"with class_tokens=2 has the tokens of its blocks as features"):
        export(ExportConfig(run=tmp_path / "run", format="timm", output=tmp_path / "out"))


def test_a_file_of_before_has_the_networks_own(tmp_path):
    backbone = vit()
    save_backbone(tmp_path, backbone, Preprocessing(32, (0.5,) * 3, (0.5,) * 3))
    about = (tmp_path / "backbone.json").read_text()
    for key in ('"class_tokens": 0', '"patch_mean": false'):
        assert key in about
        about = about.replace(f"{key},", "")
    (tmp_path / "backbone.json").write_text(about)
    assert torch.equal(load_backbone(tmp_path)[0].eval()(images()), backbone(images()))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "resnet18", "class_tokens": 1}, r"class_tokens needs a ViT. 'resnet18' is not one"),
        ({"arguments": DEEP, "class_tokens": 6}, r"class_tokens=6 is more than .* has blocks. Take at most 5"),
        ({"arguments": DEEP, "patch_mean": True}, r"patch_mean needs class tokens"),
        (
            {"arguments": DEEP | {"class_token": False, "global_pool": "avg"}, "class_tokens": 1},
            r"needs a ViT with a class token",
        ),
    ],
)
def test_what_has_none_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        create_backbone(validate(BackboneConfig, {"name": "vit_tiny_patch16_224", **settings}))


def test_methods_on_tokens_take_the_networks_own():
    with pytest.raises(ConfigError, match=r"MAE works on the tokens of the network itself"):
        require_tokens(vit(class_tokens=1), "MAE")
    tokens = vit(class_tokens=2).tokens(images())
    with pytest.raises(ValueError, match=r"pool needs the tokens of 2 blocks. Got 0"):
        vit(class_tokens=2).pool(tokens)
