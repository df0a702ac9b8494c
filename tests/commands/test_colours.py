"""Another network on the command line: mean and standard deviation are those of its weights, and a line says so."""

from __future__ import annotations

import pytest

from ssl_pipeline.backbones import BackboneConfig, Preprocessing, create_backbone, save_backbone
from ssl_pipeline.commands.finetuning import FinetuneConfig, expand
from ssl_pipeline.commands.pretrain import PretrainConfig
from ssl_pipeline.config import RECIPES, ConfigError, load

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
RESNET18 = "images are normalised with mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225 of timm's resnet18"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "weights.pth").touch()
    return str(tmp_path / "weights.pth")


def colours(*argv, recipe="continue_cnn_small"):
    data = load(PretrainConfig, [f"recipe={recipe}", *argv], recipes=RECIPES).data
    return data.mean, data.std


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "normalised" in line]


@pytest.mark.parametrize("argument", ["backbone.name=resnet18", "backbone={name: resnet18}"])
def test_another_network_of_a_file_takes_timms_in_place_of_the_recipes(file, capsys, argument):
    assert colours(argument, f"backbone.weights={file}", "data.shards=mine") == IMAGENET
    assert said(capsys) == [f"note: {RESNET18}. Set data.mean and data.std for other values."]


def test_another_network_of_a_tag_takes_the_tags(capsys):
    assert colours("backbone.name=vit_tiny_patch16_224", "backbone.weights=augreg_in21k", recipe="dino_vits16") == HALF
    assert "of timm's vit_tiny_patch16_224.augreg_in21k. Set" in said(capsys)[0]


def test_another_network_of_a_run_takes_the_runs(tmp_path, capsys):
    backbone = create_backbone(BackboneConfig(name="test_resnet"))
    save_backbone(tmp_path, backbone, Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    expected = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert colours("backbone.name=test_resnet", f"backbone.weights={tmp_path}") == expected
    assert f"std 0.4, 0.5, 0.6 of {tmp_path}. Set" in said(capsys)[0]


def test_the_defaults_are_taken_and_said_where_nothing_tells(file, capsys):
    assert colours("backbone.name=vit_small_patch16_224", f"backbone.weights={file}") == IMAGENET
    assert f"of ImageNet, as those of {file} are not known. Set" in said(capsys)[0]
    assert colours("backbone.name=resnet18", "backbone.frozen_batch_norm=false") == IMAGENET
    assert "those of the recipe are of tf_efficientnet_lite0. Set" in said(capsys)[0]


def test_what_is_given_stays(file, capsys):
    argv = ["backbone.name=resnet18", f"backbone.weights={file}", "data.mean=[0.5,0.5,0.5]"]
    assert colours(*argv) == (HALF[0], IMAGENET[1])
    assert said(capsys)[0].endswith(
        "mean 0.5, 0.5, 0.5, std 0.229, 0.224, 0.225 of timm's resnet18. Set data.std for other values."
    )
    assert colours(*argv, "data.std=[0.5,0.5,0.5]") == HALF
    assert said(capsys) == []
    assert colours(*argv[:2], "data={mean: [0.1, 0.2, 0.3]}") == ((0.1, 0.2, 0.3), IMAGENET[1])


def test_the_recipes_stay_with_its_network_and_where_they_are_about_images(file, capsys):
    assert colours(f"backbone.weights={file}") == HALF
    assert colours("backbone.name=tf_efficientnet_lite0") == HALF
    assert colours("backbone.name=resnet34", recipe="cifar10_moco_v3_resnet18") == CIFAR
    assert said(capsys) == []


def test_a_mean_that_cannot_be_read_is_told_by_its_section(file):
    with pytest.raises(ConfigError, match=r"^data\.mean"):
        colours("backbone.name=resnet18", f"backbone.weights={file}", "data.mean=[a,b,c]")


def test_finetuning_takes_those_of_the_file_too(file, capsys):
    argv = expand([f"weights={file}", "backbone.name=resnet18", "train=a.tar"])
    data = load(FinetuneConfig, argv, recipes=RECIPES).data
    assert (data.mean, data.std) == IMAGENET
    assert said(capsys) == [f"note: {RESNET18}. Set data.mean and data.std for other values."]
    expand(["weights=resnet18.a1_in1k", "train=a.tar"])
    assert said(capsys) == [f"note: {RESNET18}.a1_in1k."]
