"""Whose mean and standard deviation are taken with weights."""

from __future__ import annotations

import json

import pytest

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, save_backbone
from ssl_pipeline.backbones.known import Known, known_of

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "weights.pth").touch()
    return str(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "colours"),
    [("tf_efficientnet_lite0", (HALF, HALF)), ("resnet18", IMAGENET), ("vit_small_patch16_dinov3", IMAGENET)],
)
def test_a_file_has_what_all_weights_of_timm_for_its_architecture_have(file, name, colours):
    known = known_of(file, name=name)
    assert ((known.mean, known.std), known.of, known.network) == (colours, f"timm's {name}", None)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch16_224", "wide_resnet28_2", None])
def test_nothing_is_guessed_where_they_differ_or_there_are_none(file, name):
    assert known_of(file, name=name) == Known()


def test_a_tag_has_its_own():
    assert known_of("dino", name="vit_small_patch16_224").mean == IMAGENET[0]
    known = known_of("augreg_in1k", name="vit_small_patch16_224")
    assert (known.mean, known.of) == (HALF, "timm's vit_small_patch16_224.augreg_in1k")
    assert known_of("nosuchtag", name="resnet18") == Known({"name": "resnet18"})
    assert known_of("a1_in1k", name="nosuchmodel") == Known()


def test_the_export_of_a_run_has_the_runs_as_directory_and_as_file(tmp_path):
    backbone = create_backbone(BackboneConfig(name="test_resnet"))
    save_backbone(tmp_path, backbone, Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    for place in (tmp_path, tmp_path / "backbone.safetensors"):
        known = known_of(str(place), name="test_resnet")
        assert (tuple(known.mean), tuple(known.std), known.of) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), str(place))


def test_a_folder_of_timm_says_its_network(tmp_path):
    published = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    arguments = {"zero_init_last": False, "dynamic_img_size": True}
    about = {"architecture": "resnet18", "pretrained_cfg": published, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "model.safetensors").touch()
    for place in (tmp_path, tmp_path / "model.safetensors"):
        known = known_of(str(place), name=None)
        assert known.network == {"name": "resnet18", "arguments": {"zero_init_last": False}}
        assert (known.size, known.mean) == (64, [0.1, 0.2, 0.3])
    (tmp_path / "config.json").write_text(json.dumps(about | {"architecture": "mine"}))
    assert known_of(str(tmp_path), name=None).network is None


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}),
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
    ],
)
def test_a_model_of_hugging_face_has_those_of_its_folder(tmp_path, name, about):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / name).write_text(json.dumps(about))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        known = known_of(str(place), name="resnet18")
        assert (known.mean, known.std, known.of) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], str(tmp_path / name))
